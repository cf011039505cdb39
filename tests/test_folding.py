"""``normfuse.fold``: a module, a program or a file in; a model that PyTorch runs and its certificate out."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import FoldOptions, LayerNorms, fold
from normfuse.artifact import verify_artifact
from normfuse.errors import BadInput, UsageError
from normfuse.folding import Folded
from normfuse.graph.capture import export_program
from normfuse.nn import RepBN, UnifiedNorm
from normfuse.testing import Small, distance, randomized, seeded

EXACT = 1e-12


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(9))


class Mixed(nn.Module):
    """A padded convolution behind a batch norm, tokens, a layer norm on the stream, a norm between nonlinearities."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
        self.patch, self.token = nn.Conv2d(3, 7, 3, padding=1), nn.Parameter(torch.zeros(1, 1, 7))
        self.ln, self.mlp, self.alone = nn.LayerNorm(7), nn.Linear(7, 7), UnifiedNorm(7)
        self.last, self.head = nn.LayerNorm(7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(self.bn(torch.tanh(self.stem(x))))
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = x + self.mlp(torch.sigmoid(self.alone(torch.tanh(self.ln(x)))))
        return self.head(self.last(x)[:, 0])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, Tensor, Folded]:
    model, x = randomized(Mixed()).double(), sample(2, 2, 5, 4).double()
    return model, x, fold(model, (x,))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_module_is_the_model_for_any_batch(mixed: tuple[nn.Module, Tensor, Folded], batch: int) -> None:
    model, _, folded = mixed
    x = sample(batch, 2, 5, 4).double()
    assert distance([folded.module(x)], [model(x)]) < EXACT


def test_certificate(mixed: tuple[nn.Module, Tensor, Folded]) -> None:
    _, _, folded = mixed
    found = folded.certificate
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert folded.holds is found["holds"] is True
    assert found["norms"] == {"before": {"batch_norm": 1, "layer_norm": 2}, "after": {"layer_norm": 1, "rms_norm": 1}}
    assert found["samples"] == {"count": 2, "origin": "random samples, seed 0"}
    assert found["error"]["float64"] < EXACT
    assert found["undone"] == []
    assert found["refreshed"] == 0
    affines = found["affines"]
    assert affines["found"] == affines["folded"] + affines["left"]


def test_every_site_says_what_went_where_and_how_exactly(mixed: tuple[nn.Module, Tensor, Folded]) -> None:
    sites = {(site["rule"], site["affine"]): site for site in mixed[2].certificate["sites"]}
    bn = sites["fold-before-linear", "bn"]
    assert bn["into"] == "patch"
    assert bn["formula"] == "W' = W diag(a), b' = b + W c"
    assert bn["repair"] in ("padded with -c / a instead of 0", "border correction added behind the convolution")
    assert " to " in bn["scale"]
    assert " to " in bn["shift"]
    (stream,) = [site for site in sites.values() if site["rule"] == "layer-norm-is-rms-norm"]
    assert stream["affine"] == "last"
    assert {"patch", "mlp"} <= set(stream["into"].split(", "))
    for site in sites.values():
        assert 0.0 <= site["relative"] <= 1e-12
        assert site["absolute"] >= 0.0
        assert site["compared"]


def test_everything_left_has_its_reason(mixed: tuple[nn.Module, Tensor, Folded]) -> None:
    left = {(each["what"], each["layer"]): each for each in mixed[2].certificate["left"]}
    assert left["affine", "alone"]["reason"] in ("no_linear", "nonlinear_reader")
    assert left["affine", "alone"]["because"]
    assert left["affine", "ln"]["reason"] == "nonlinear_reader"
    assert left["norm", "ln"]["detail"] == "its beta did not fold, and RMS norm has none"
    assert len(left) == 3
    affines = [each for each in mixed[2].certificate["left"] if each["what"] == "affine"]
    assert len(affines) == mixed[2].certificate["affines"]["left"]


def test_a_border_made_for_one_position_meets_no_other_size() -> None:
    parts = [nn.Conv2d(2, 3, 1), nn.Tanh(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)]
    folded = fold(randomized(nn.Sequential(*parts)), (sample(2, 2, 1, 1),))
    assert any(site["repair"] for site in folded.certificate["sites"])
    with pytest.raises(AssertionError, match="axis 2 of input input is not 1"):
        folded.module(sample(2, 2, 9, 9))


def test_the_original_is_not_changed_and_does_not_change_the_result() -> None:
    model, x = randomized(Mixed()).train(), sample(2, 2, 5, 4)
    model.ln.eval()
    before, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    folded = fold(model, (x,))
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    expected = folded.module(x)
    with torch.no_grad():  # training goes on
        for parameter in model.parameters():
            parameter.mul_(2.0)
    assert torch.equal(folded.module(x), expected)


def test_the_module_goes_on_being_used(mixed: tuple[nn.Module, Tensor, Folded]) -> None:
    _, x, folded = mixed
    module, expected = folded.module, folded.module(x)
    assert isinstance(module, nn.Module)
    assert not module.training
    assert torch.equal(module.eval()(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    assert copy.deepcopy(module).half()(x.half()).dtype == torch.float16
    twin = folded.module
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), expected)
    assert all(tensor.is_floating_point() for tensor in module.state_dict().values())


def test_the_module_is_exported_again_and_folded_again(mixed: tuple[nn.Module, Tensor, Folded]) -> None:
    _, x, folded = mixed
    archive = io.BytesIO()
    torch.export.save(torch.export.export(folded.module, (x,)), archive)
    archive.seek(0)
    assert torch.equal(torch.export.load(archive).module()(x), folded.module(x))
    again = fold(folded.module, (x,))
    assert again.holds
    assert distance([again.module(x)], [folded.module(x)]) < EXACT
    assert again.certificate["norms"]["before"] == folded.certificate["norms"]["after"]


def test_a_program_and_a_file_fold_as_the_module_does(tmp_path: Path) -> None:
    model, x = randomized(Mixed()), sample(2, 2, 5, 4)
    normfuse.save(model, [x], tmp_path / "model.pt2")
    made = [fold(model, (x,)), fold(export_program(model, (x,))), fold(tmp_path / "model.pt2")]
    made.append(fold(str(tmp_path / "model.pt2"), calibration={"x": sample(3, 2, 5, 4).numpy()}))  # type: ignore[arg-type]
    for folded in made:
        assert folded.holds
        assert folded.certificate["affines"] == made[0].certificate["affines"]
        assert torch.equal(folded.module(x), made[0].module(x))


def test_saved_and_loaded(mixed: tuple[nn.Module, Tensor, Folded], tmp_path: Path) -> None:
    model, _, folded = mixed
    folded.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "certificate.json",
        "manifest.json",
        "model.pt2",
    ]
    assert verify_artifact(tmp_path / "out") == []
    assert json.loads((tmp_path / "out" / "certificate.json").read_text()) == folded.certificate
    loaded = torch.export.load(tmp_path / "out" / "model.pt2").module()
    x = sample(3, 2, 5, 4).double()
    assert distance([loaded(x)], [model(x)]) < EXACT
    folded.save(tmp_path / "out")  # an artifact is replaced
    with pytest.raises(BadInput, match="no engine"):
        normfuse.load(tmp_path / "out")


def test_what_is_no_artifact_is_not_replaced(mixed: tuple[nn.Module, Tensor, Folded], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError):
        mixed[2].save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


class Named(nn.Module):
    """Two inputs, one called like a builtin, and several outputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.norm, self.kind = nn.Linear(4, 5), UnifiedNorm(5), kind

    def forward(self, input: Tensor, id: Tensor) -> Any:
        y = self.norm(self.first(input)) + id
        results = {"bare": y, "pair": (y, id - y), "dict": {"logits": y, "rest": id - y}, "one": {"logits": y}}
        return results[self.kind]


@pytest.mark.parametrize("kind", ["bare", "pair", "dict", "one"])
def test_inputs_and_outputs_are_those_of_the_model(kind: str) -> None:
    model = randomized(Named(kind))
    inputs = (sample(2, 4), sample(2, 5))
    folded = fold(model, inputs)
    assert folded.certificate["affines"]["left"] == 0
    found, expected = folded.module(*inputs), model(*inputs)
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(folded.module(id=inputs[1], input=inputs[0]), expected)


def normed() -> nn.Module:
    return randomized(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))


def test_refreshed_norms_are_those_of_the_data() -> None:
    data = np.random.default_rng(0).normal(3.0, 2.0, (40, 4)).astype(np.float32)
    model = normed().double()
    folded = fold(
        model,
        (torch.from_numpy(data[:2]).double(),),
        calibration=normfuse.Samples(**vars_of(data)),
        options=FoldOptions(refresh_norms=True),
    )
    assert folded.certificate["refreshed"] == 1
    assert folded.certificate["samples"]["origin"] == "the test"
    assert folded.holds, "the certificate is of the refreshed model"
    x = torch.from_numpy(data).double()
    with torch.no_grad():
        y = model[0](x)  # type: ignore[operator, index]
        norm: Any = model[1]  # type: ignore[index]
        norm.running_mean.copy_(y.mean(0))
        norm.running_var.copy_(y.var(0))
    assert distance([folded.module(x)], [model(x)]) < 1e-10


def vars_of(data: Any) -> dict[str, Any]:
    from normfuse.data import load_samples

    loaded = load_samples({"input": data}, name="the test")
    return {"source": "the test", "names": loaded.names, "count": loaded.count, "read": loaded.read}


def test_refreshing_needs_data() -> None:
    with pytest.raises(UsageError, match="without data"):
        fold(normed(), (sample(2, 4),), options=FoldOptions(refresh_norms=True))


def test_a_fold_needs_samples_to_check_with() -> None:
    with pytest.raises(UsageError, match="0 samples"):
        fold(normed(), (sample(2, 4),), options=FoldOptions(samples=0))


def test_a_module_needs_example_inputs() -> None:
    with pytest.raises(UsageError, match="must be run once"):
        fold(normed())


def test_example_inputs_may_be_one_tensor_or_have_names() -> None:
    made = [fold(normed(), example) for example in (sample(2, 4), {"input": sample(2, 4)}, (sample(2, 4),))]
    assert made[0].certificate == made[1].certificate == made[2].certificate


def test_layer_norms_stay_where_they_are_to_stay() -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)))
    kept = fold(model, (x := sample(2, 4),), options=FoldOptions(layer_norms=LayerNorms.KEEP))
    assert kept.certificate["norms"]["after"] == {"layer_norm": 1}
    made = fold(model, (x,))
    assert made.certificate["norms"]["after"] == {"rms_norm": 1}
    torch.testing.assert_close(made.module(x), kept.module(x))


def test_the_seed_and_the_number_of_samples_are_said() -> None:
    made = fold(normed(), (sample(2, 4),), options=FoldOptions(samples=3, seed=5))
    assert made.certificate["samples"] == {"count": 3, "origin": "random samples, seed 5"}


def test_a_model_without_norms_is_itself() -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 5), nn.Tanh()))
    folded = fold(model, (x := sample(2, 4),))
    assert folded.holds
    assert folded.certificate["sites"] == folded.certificate["left"] == []
    assert torch.equal(folded.module(x), model(x))


def test_a_model_whose_values_are_no_numbers_still_has_a_certificate() -> None:
    model = randomized(
        Small(lambda m, x: m.f(m.n(m.g((x * 0).log()))), f=nn.Linear(5, 3), n=RepBN(5), g=nn.Linear(4, 5))
    )
    folded = fold(model, (sample(2, 4),))
    json.dumps(folded.certificate, allow_nan=False)
    assert folded.certificate["error"]["float64"] == 0.0
