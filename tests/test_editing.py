"""Editing: editors are equivariant, they write SIRENs, and what cannot be edited is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from layer_kit import draw_weights, randomise
from torch import Tensor, nn
from zoo_kit import write_zoo

from qemcli import conventions, groups, signals
from qemcli.architectures import nfn
from qemcli.designs import Design
from qemcli.editors import ByEditor, edited
from qemcli.errors import InputError, UsageError
from qemcli.expansion import folded, merge, shown
from qemcli.layers.shown import Shown
from qemcli.predictor_files import FILE
from qemcli.predictors import Predictor
from qemcli.samples import gather
from qemcli.spaces import Chain, mlp, siren
from qemcli.tasks import editing
from qemcli.zoos.store import Store
from qemcli.zoos.zoo import Zoo

SPACE = siren([2, 5, 7, 1], image=(1, 9, 8))
CONFIG = {"edit": "dilate", "channels": (4, 4), "fourier": 3, "fourier_scale": 0.5, "expand": 3}


def make(quasi: str = "none", space: Chain = SPACE, **config: object) -> Predictor:
    torch.manual_seed(0)
    design = Design("nfn", quasi, {**CONFIG, **config})
    model = randomise(design.build(space), size=0.5).eval()
    return Predictor("small", space, design, "editing", model)


def moved_apart(predictor: Predictor, group: str) -> float:
    """How far edit(g w) is from g edit(w), in float64, over the size of what the editor adds."""
    rng = torch.Generator().manual_seed(1)
    space, k = predictor.space, CONFIG["expand"]
    predictor.model.double()
    w = draw_weights(space, 4, rng)
    g = groups.sample(group, space, 4, rng)
    each = torch.arange(4).repeat_interleave(k)
    with torch.no_grad():
        plain, moved = edited(predictor, w), edited(predictor, groups.act(g, space, w))
    expected = groups.act(g.rows(each), space, folded(plain))
    gaps = [(folded(moved)[n] - expected[n]).abs().max().item() for n in space.names]
    sizes = [(plain[n] - w[n][:, None]).abs().max().item() for n in space.names]
    assert min(sizes) > 1e-4
    return max(gap / size for gap, size in zip(gaps, sizes, strict=True))


@pytest.mark.parametrize("linear", ["hnp", "hnp-full", "np-posemb", "np"])
@pytest.mark.parametrize("quasi", ["none", "exact"])
def test_editor_commutes_with_permutations(linear: str, quasi: str) -> None:
    assert moved_apart(make(quasi, linear=linear), "permutation") < 1e-10


@pytest.mark.parametrize("group", ["permutation", "sign", "phase", "monomial", "all"])
def test_balanced_editor_commutes_with_every_symmetry(group: str) -> None:
    assert moved_apart(make("balanced"), group) < 1e-9


@pytest.mark.parametrize("quasi", ["none", "exact", "paper", "released"])
def test_monomial_editor_commutes_as_far_as_its_quasi_layer_does(quasi: str) -> None:
    torch.manual_seed(0)
    config = {"even": "products", "pool": "means", "reader": "hnp-full", "reader_channels": (4, 4)}
    eps = {} if quasi == "none" else {"eps": 0.5}
    known = {"edit": "dilate", "channels": (3, 4), "expand": 3, **config, **eps}
    design = Design("monomial_nfn", quasi, known)
    model = randomise(design.build(SPACE), size=0.5).eval()
    predictor = Predictor("small", SPACE, design, "editing", model)
    kept = {"permutation", "sign", "monomial"} if quasi in ("none", "exact") else set()
    assert predictor.claims == kept
    for group in ("permutation", "sign"):
        gap = moved_apart(predictor, group)
        assert gap < 1e-10 if kept else gap > 1e-3


def test_controls_do_not_commute() -> None:
    assert moved_apart(make("none"), "sign") > 1e-3
    assert moved_apart(make("none"), "phase") > 1e-3
    assert moved_apart(make("paper", eps=0.9), "permutation") > 1e-3
    assert moved_apart(make("released", eps=0.9), "permutation") > 1e-3
    assert moved_apart(make("exact"), "phase") > 1e-3


def test_claims_are_what_holds() -> None:
    assert make("none").claims == {"permutation"}
    assert make("exact").claims == {"permutation"}
    assert make("paper").claims == set()
    assert make("balanced").claims >= {"permutation", "sign", "phase"}


def test_picture_shown_is_that_of_the_edited_networks(rng: torch.Generator) -> None:
    for quasi in ("none", "balanced"):
        predictor = make(quasi)
        predictor.model.double()
        w = draw_weights(SPACE, 3, rng)
        with torch.no_grad():
            picture = predictor(w)
            branches = edited(predictor, w)
        wide, merged = merge(SPACE, branches)
        expected = shown(SPACE, branches).flatten(1)
        torch.testing.assert_close(picture, expected, atol=1e-9, rtol=0)
        torch.testing.assert_close(signals.render(wide, merged).flatten(1), expected)
        assert (picture - signals.render(SPACE, w).flatten(1)).abs().max() > 1e-3


def test_an_untrained_editor_changes_next_to_nothing() -> None:
    torch.manual_seed(0)
    model = Shown(SPACE, nfn.Editor(SPACE, nfn.Config((8, 8), expand=4))).eval()
    w = draw_weights(SPACE, 3, torch.Generator().manual_seed(0))
    w = {n: x.float() for n, x in w.items()}
    with torch.no_grad():
        deltas = model.editor(w)
    assert all(d.shape == (3, 4, *w[n].shape[1:]) for n, d in deltas.items())
    assert all(0 < d.abs().max() < 0.05 for d in deltas.values())
    # Branches differ from the start, or their gradients would always be the same.
    assert (deltas["2.weight"][:, 0] - deltas["2.weight"][:, 1]).abs().max() > 1e-4


def test_loss_on_some_pixels_is_that_of_all_on_average() -> None:
    predictor = make()
    w = {n: x.float() for n, x in draw_weights(SPACE, 2, torch.Generator().manual_seed(0)).items()}
    target = torch.rand(2, 72, generator=torch.Generator().manual_seed(1))
    model = predictor.model
    whole = editing.mse(model(w).detach().numpy(), target.numpy())
    model.train()
    with torch.no_grad():
        assert editing.loss(model(w), target).item() == pytest.approx(whole, rel=1e-5)
        model.pixels = 24
        torch.manual_seed(0)
        losses = [editing.loss(model(w), target).item() for _ in range(150)]
    assert len(model(w).at) == 24
    assert np.mean(losses) == pytest.approx(whole, rel=0.03)
    assert np.std(losses) > 0


def test_reduced_scores_are_those_of_the_pictures() -> None:
    rng = np.random.default_rng(0)
    found, wanted = rng.random((2, 20, 72))
    wanted[3] = np.nan
    whole = editing.score(np.delete(found, 3, 0), np.delete(wanted, 3, 0))
    found[3] = np.nan
    assert editing.score(found, np.nan_to_num(wanted)) == pytest.approx(whole)
    kept = [np.delete(x, 3, 0) for x in (found, wanted)]
    assert editing.score(*editing.reduced(*kept)) == pytest.approx(whole)
    assert whole["psnr"] == pytest.approx(-10 * np.log10(whole["mse"]))


def fitted(count: int, space: Chain = SPACE, seed: int = 0) -> Tensor:
    """Networks of the scale of SIRENs, which show something smooth."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, space.size, generator=rng) * 0.1


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return write_zoo(tmp_path / "sirens", SPACE, fitted(24))


@pytest.fixture
def editor(tmp_path: Path) -> Path:
    return make("balanced").save(tmp_path / "editor").parent


def test_edit_writes_sirens_that_plain_torch_loads(run, zoo: Path, editor: Path) -> None:
    ran = run("edit", zoo, "--predictor", editor, "--out", "edited", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["networks"] == len(ran.json["rows"]) == 24
    assert ran.json["branches"] == 3
    done, source = Zoo.open("edited"), Zoo.open(zoo)
    ((wide, flat, positions),) = done.load()
    assert wide.widths == (2, 15, 21, 1)
    index = done.index.iloc[positions]
    kept = source.index.set_index("checkpoint").loc[index["source"]]
    for column in ("run", "split", "test_accuracy", "config.lr"):
        assert index[column].tolist() == kept[column].tolist()
    pictures = signals.render(wide, wide.unflatten(flat))
    for row in (0, 7):
        layers = [nn.Linear(2, 15), nn.Linear(15, 21), nn.Linear(21, 1)]
        state = {n: x[row] for n, x in wide.unflatten(flat).items()}
        nn.Sequential(
            layers[0], nn.Identity(), layers[1], nn.Identity(), layers[2]
        ).load_state_dict(state, strict=True)
        y, x = torch.meshgrid(torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 8), indexing="ij")
        h = torch.stack([y, x], dim=-1)
        with torch.no_grad():
            for layer in layers[:2]:
                h = torch.sin(30 * layer(h))
            plain = (layers[2](h)[..., 0] + 1) / 2
        torch.testing.assert_close(plain, pictures[row, 0], atol=1e-5, rtol=0)
        ((space, before, _),) = source.load(
            np.flatnonzero(source.index["checkpoint"] == index["source"].iloc[row])
        )
        wanted = torch.nn.functional.max_pool2d(
            signals.render(space, space.unflatten(before)).clamp(0, 1), 3, 1, 1
        )
        told = ran.json["rows"][row]
        assert told["checkpoint"] == index["checkpoint"].iloc[row]
        assert told["mse"] == pytest.approx((plain - wanted).square().mean().item(), rel=1e-4)


def test_an_interrupted_edit_goes_on_to_the_same_bytes(
    run, zoo: Path, editor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qemcli.editing

    monkeypatch.setattr(qemcli.editing, "CHUNK", 8)
    call = ("edit", zoo, "--predictor", editor, "--quiet", "--out")
    assert run(*call, "whole").code == 0
    calls = ByEditor.__call__
    left = iter(range(2))

    def cut(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return calls(*arguments)

    monkeypatch.setattr(ByEditor, "__call__", cut)
    assert run(*call, "cut").code == 130
    assert not Path("cut/index.parquet").exists()
    monkeypatch.setattr(ByEditor, "__call__", calls)
    assert run(*call, "cut").code == 2  # it is not empty
    assert run(*call, "cut", "--resume").code == 0
    flats = [next(Zoo.open(name).load())[1] for name in ("whole", "cut")]
    assert torch.equal(*flats)


def test_what_cannot_be_edited_is_counted_and_nothing_is_written_half(
    run, tmp_path: Path, editor: Path
) -> None:
    spaces = {
        "image": SPACE.running(image=(1, 8, 9)),
        "widths": siren([2, 5, 6, 1], image=(1, 9, 8)),
        "outputs": siren([2, 5, 7, 2]),
        "mlp": mlp([2, 5, 7, 1], "relu"),
        "unknown": SPACE.running(known=False),
    }
    said = {"image": "1x8x9", "widths": "widths", "outputs": "no image",
            "mlp": "not a SIREN", "unknown": "w0"}  # fmt: skip
    for name, space in spaces.items():
        zoo = write_zoo(tmp_path / name, space, fitted(12, space))
        ran = run("edit", zoo, "--predictor", editor, "--out", "nothing")
        assert ran.code == 3, (name, ran.err)
        assert "none of 12 networks can be edited" in ran.err
        assert said[name] in ran.err, (name, ran.err)
        assert not Path("nothing").exists()
    zoo = tmp_path / "unknown"
    ran = run("edit", zoo, "--predictor", editor, "--out", "a", "--w0", 30, "--convention", "nfn")
    assert ran.code == 0, ran.err


def test_sirens_of_another_convention_are_edited_alike_in_their_own(
    run, tmp_path: Path, editor: Path
) -> None:
    store = Store(tmp_path / "mixed")
    others = [
        siren([2, 5, 7, 1], convention="dws", image=(1, 9, 8)),
        SPACE.running(w0=20.0),
        SPACE.running(image=(1, 8, 9)),
    ]
    flat = fitted(5, SPACE)
    for block, space in enumerate((SPACE, *others)):
        rows = [{"checkpoint": f"{block}-{i}", "split": "test"} for i in range(5)]
        same = conventions.express(SPACE, space, flat)
        store.write(block, space, same.numpy(), rows)
    store.finish(4, {"name": "mixed"})
    ran = run("edit", tmp_path / "mixed", "--predictor", editor, "--out", "edited", "--json")
    assert ran.code == 4
    assert [item["checkpoint"] for item in ran.json["failed"]] == [f"3-{i}" for i in range(5)]
    assert all("1x8x9" in item["reason"] for item in ran.json["failed"])
    found = {space: space.unflatten(rows) for space, rows, _ in Zoo.open("edited").load()}
    run_as = [(space.forward.axes, space.forward.w0) for space in found]
    assert sorted(run_as) == [("ij", 20), ("ij", 30), ("xy", 30)]
    first, *rest = (signals.render(space, w) for space, w in found.items())
    assert all(torch.allclose(first, other, atol=1e-4) for other in rest)
    assert not torch.allclose(first, signals.render(SPACE, SPACE.unflatten(flat)), atol=1e-4)
    with pytest.raises(InputError, match=r"mixes.*axes"):
        gather([Zoo.open(tmp_path / "mixed")], editing, edit="dilate")


def test_a_network_that_is_not_finite_fails_alone(run, tmp_path: Path, editor: Path) -> None:
    flat = fitted(12)
    flat[3, 5] = float("nan")
    zoo = write_zoo(tmp_path / "some", SPACE, flat)
    ran = run("edit", zoo, "--predictor", editor, "--out", "edited", "--json")
    assert ran.code == 4
    assert ran.json["networks"] == 11
    assert ran.json["failed"] == [
        {"checkpoint": "run-003/step-00001", "reason": "weights that are not finite"}
    ]
    none = write_zoo(tmp_path / "none", SPACE, flat * float("nan"))
    assert run("edit", none, "--predictor", editor, "--out", "nothing").code == 3
    assert not Path("nothing").exists()


def test_refit_shows_the_edited_picture(run, tmp_path: Path) -> None:
    space = siren([2, 16, 16, 1], image=(1, 8, 8), convention="dws")
    zoo = write_zoo(tmp_path / "sirens", space, fitted(12, space))
    ran = run("edit", zoo, "--edit", "invert", "--refit", "--out", "edited", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["mse"] <= 1.01e-4 < 0.1 < ran.json["mse_unedited"]
    assert Zoo.open("edited").index["psnr"].min() >= 39.9


def test_preview_and_true_pictures(run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    digits = pytest.importorskip("sklearn.datasets").load_digits().images
    space = siren([2, 8, 8, 1], image=(1, 8, 8), convention="dws")
    zoo = write_zoo(tmp_path / "sirens", space, fitted(12, space), image=np.arange(12) + 5)
    call = ("edit", zoo, "--edit", "invert", "--refit", "--limit", 8, "--source", "digits")
    ran = run(*call, "--out", "edited", "--preview", "sheet.png", "--json")
    assert ran.code == 0, ran.err
    assert Path("sheet.png").stat().st_size > 1000
    ((space, flat, _),) = Zoo.open(zoo).load([3])
    wanted = torch.from_numpy(1 - digits[8] / 16)
    error = signals.render(space, space.unflatten(flat))[0, 0] - wanted
    assert ran.json["rows"][3]["mse_unedited"] == pytest.approx(error.square().mean().item())
    assert run(*call, "--out", "other", "--preview", "nowhere/sheet.png").code == 2
    assert not Path("other").exists()
    plain = write_zoo(tmp_path / "plain", space, fitted(12, space))
    ran = run("edit", plain, "--refit", "--source", "digits", "--out", "third")
    assert ran.code == 3
    assert "no column 'image'" in ran.err
    assert not Path("third").exists()


def test_editors_are_asked_for_what_they_were_trained_for(run, zoo: Path, editor: Path) -> None:
    for more, said in (
        (["--edit", "erode"], "was trained for 'dilate'"),
        (["--expand", 2], "has 3 branches"),
        (["--refit"], "--refit does without"),
    ):
        ran = run("edit", zoo, "--predictor", editor, "--out", "nothing", *more)
        assert ran.code == 2, ran.err
        assert said in ran.err
    ran = run("edit", zoo, "--predictor", "cnn-relu", "--out", "nothing")
    assert ran.code == 2
    assert "edits nothing" in ran.err
    ran = run("edit", zoo, "--edit", "rotate:33", "--out", "nothing")
    assert ran.code == 3
    assert "no shipped editor of 'rotate:33'" in ran.err
    assert not Path("nothing").exists()


def test_train_makes_an_editor_that_verify_and_evaluate_read(
    run, zoo: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "train.toml"
    recipe.write_text(
        'task = "editing"\nedit = "contrast:2"\narchitecture = "nfn"\nquasi = "balanced"\n'
        "[config]\nchannels = [4]\nexpand = 2\npixels = 20\n"
        "[schedule]\nepochs = 2\nbatch_size = 8\n"
    )
    trained = run("train", recipe, "--zoo", zoo, "--out", "made", "--json")
    assert trained.code == 0, trained.err
    assert {"mse", "mse_low", "psnr"} <= set(trained.json["rows"][0])
    assert Predictor.load("made").design.edit == "contrast:2"
    assert (Path("made") / FILE).is_file()
    scored = run("evaluate", "made", zoo, "--augment", "phase", "--json")
    plain, moved = scored.json["rows"]
    assert plain["mse"] == pytest.approx(moved["mse"], rel=1e-3)
    assert plain["mse"] == pytest.approx(trained.json["rows"][0]["mse"], rel=1e-4)
    done = run("edit", zoo, "-p", "made", "--out", "edited", "--where", "split == 'test'", "--json")
    assert done.json["mse"] == pytest.approx(plain["mse"], rel=1e-3)


def test_a_predictor_of_sirens_reads_those_that_are_run_alike(run, tmp_path: Path) -> None:
    predictor = make("balanced")
    other = siren([2, 5, 7, 1], convention="dws", image=(1, 9, 8))
    assert predictor.reads(SPACE)
    assert predictor.reads(other.running(known=False))
    assert not predictor.reads(other)
    folder = predictor.save(tmp_path / "editor").parent
    zoo = write_zoo(tmp_path / "other", other, fitted(12, other))
    ran = run("evaluate", folder, zoo)
    assert ran.code == 3
    assert "run in another way" in ran.err


def test_recipes_name_the_edit_with_the_task(tmp_path: Path) -> None:
    from qemcli import recipes

    path = tmp_path / "train.toml"
    for text in ('task = "editing"', 'edit = "dilate"', 'task = "editing"\nedit = "dilat"'):
        path.write_text(f'{text}\narchitecture = "nfn"\n')
        with pytest.raises(UsageError):
            recipes.load(path)
    path.write_text('task = "editing"\nedit = "dilate"\n[config]\nfourier = 2\n')
    other = recipes.editing(recipes.load(path), "rotate", 4).design
    assert other.config == {"fourier": 2, "edit": "rotate:10", "expand": 4}
    with pytest.raises(UsageError, match="are for editors"):
        recipes.editing(recipes.Recipe(), "dilate", None)
    with pytest.raises(UsageError, match="no editor"):
        Design("statnn", config={"edit": "dilate"}).build(SPACE)


def test_verification_reads_the_editor_behind_the_picture() -> None:
    from qemcli import verification

    predictor = make("exact", eps=0.9)
    report = verification.verify(predictor, fitted(6), None, verification.Check(samples=3))
    kinds = {(row["kind"], row["group"]): row["holds"] for row in report.rows}
    assert report.code == 0
    assert kinds["equivariance", "permutation"]
    assert kinds["invariance", "sign"] is False
    assert next(r for r in report.rows if r["kind"] == "leak")["max_error"] > 1e-6


def test_a_comparison_shares_its_configuration_and_has_one_edit(tmp_path: Path) -> None:
    from qemcli import comparison

    path = tmp_path / "compare.toml"
    designs = '[[design]]\narchitecture = "nfn"\nconfig = { expand = 4 }\n'
    path.write_text(f'task = "editing"\n[config]\nedit = "dilate"\n{designs}')
    plan = comparison.load(path)
    assert plan.edit == "dilate"
    assert plan.designs[0].config == {"edit": "dilate", "expand": 4}
    more = '[[design]]\narchitecture = "nfn"\nconfig = { edit = "erode" }\n'
    path.write_text(f'task = "editing"\n[config]\nedit = "dilate"\n{designs}{more}')
    with pytest.raises(UsageError, match="different edits"):
        _ = comparison.load(path).edit


@pytest.mark.parametrize("name", ["dilate-mnist", "contrast-fashion"])
def test_recipes_of_the_shipped_editors_build_what_they_say(name: str) -> None:
    from qemcli import recipes

    plan = recipes.load(recipes.find(name, "training", "train.toml"))
    space = siren([2, 32, 32, 1], convention="dws", image=(1, 28, 28))
    model = plan.design.build(space)
    assert plan.task == "editing"
    assert sum(p.numel() for p in model.parameters()) * 4 < 3e6
    assert name.startswith(plan.design.edit.split(":")[0])
