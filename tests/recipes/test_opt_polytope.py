"""opt-polytope: the polygons, the layer, what is learned, measured, drawn and written."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra: implicitly[recipes]")
pytest.importorskip("matplotlib", reason="needs the extra: implicitly[viz]")

from implicitly import viz
from implicitly.recipes import opt_polytope
from implicitly.recipes.opt_polytope import (
    EDGE,
    REACH,
    Config,
    Polytope,
    Training,
    agreement,
    count_faces,
    distance,
    fit,
    is_inside,
    random_polygon,
    sample,
)

SMALL = Config(polygons=(4,), epochs=10, points=500, batch_size=125, faces=8, progress=False)


@pytest.mark.parametrize("faces", [3, 4, 5, 8, 12])
def test_polygons_have_the_faces_that_are_asked_for(faces):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        G, h = random_polygon(faces, generator)
        torch.testing.assert_close(G.norm(dim=1), torch.ones(faces, dtype=torch.float64))
        corners, edges = viz.vertices(G, h)
        assert len(corners) == faces
        assert (edges > EDGE).all()
        assert corners.abs().max() < REACH
        inside = is_inside(sample(1000, generator), G, h)
        assert 0.1 < inside.double().mean() < 0.8


def test_the_layer_projects():
    generator = torch.Generator().manual_seed(0)
    layer = Polytope(4, torch.zeros(2, dtype=torch.float64), radius=0.5)  # the square |x| <= 1/2, |y| <= 1/2
    x = sample(100, generator)
    torch.testing.assert_close(layer(x), x.clamp(-0.5, 0.5), rtol=0, atol=1e-7)


def test_the_distance_has_a_derivative_everywhere():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    z = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    moved = distance(x, z)
    torch.testing.assert_close(moved, torch.tensor([0.0, 5.0], dtype=torch.float64), rtol=1e-6, atol=1e-12)
    moved.sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.tensor([[0.0, 0.0], [-0.6, -0.8]], dtype=torch.float64))


def test_the_gradient_of_the_loss_is_that_of_finite_differences():
    training = Training(4, SMALL)
    x, inside = (tensor[:40] for tensor in training.points.tensors)

    def loss(G, h):
        layer = Polytope(len(h), torch.zeros(2, dtype=torch.float64))
        moved = distance(x, torch.func.functional_call(layer, {"G": G, "h": h}, (x,)))
        return torch.where(inside, moved, (0.5 - moved).relu()).mean()

    assert torch.autograd.gradcheck(loss, tuple(tensor.requires_grad_() for tensor in training.faces()))


@pytest.mark.slow
def test_training_finds_the_polygon():
    training = Training(4, SMALL)
    before, _ = agreement(training, *training.faces())
    result = fit(4, replace(SMALL, epochs=25))
    assert before < 0.1
    assert result.iou > 0.93
    assert result.accuracy > 0.98
    assert 4 <= result.faces <= SMALL.faces
    assert len(result.training.history) == 26


def test_training_can_be_repeated():
    config = replace(SMALL, epochs=1)
    first, second = (fit(4, config).training.faces() for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(fit(4, replace(config, seed=1)).training.faces()[0], first[0])


def test_faces_that_cut_nothing_off_are_not_counted():
    G, h = random_polygon(5, torch.Generator().manual_seed(0))
    assert count_faces(G, h) == 5
    assert count_faces(torch.cat([G, G]), torch.cat([h, h + 0.1])) == 5
    corners, _ = viz.vertices(G, h)
    outward = corners[0] / corners[0].norm()
    for depth, faces in ((0.3, 6), (1e-3, 5)):  # a corner cut off, and one hardly touched
        bound = outward @ corners[0] - depth
        assert count_faces(torch.cat([G, outward[None]]), torch.cat([h, bound[None]])) == faces


def test_agreement_of_the_truth_is_perfect():
    training = Training(5, SMALL)
    assert agreement(training, *training.truth) == (1.0, 1.0)
    G, h = training.truth
    iou, _ = agreement(training, G, h / 2)  # a quarter of the area
    assert iou == pytest.approx(0.25, abs=0.02)


def test_main_leaves_a_table_a_picture_and_weights(tmp_path, capsys):
    config = replace(SMALL, polygons=(3, 4), epochs=2, out=tmp_path)
    results = opt_polytope.main(config)
    text = capsys.readouterr().out
    for result in results:
        assert f"{100 * result.iou:.1f} %" in text
        weights = torch.load(tmp_path / f"{result.polygon}.pt")
        assert torch.equal(weights["G"], result.training.layer.G)
    assert (tmp_path / "polytopes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"faces": 2}, "faces must be at least 3; got 2"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"margin": 0.0}, "margin must be positive"),
        ({"polygons": ()}, "polygons must be different numbers"),
        ({"polygons": (2,)}, "each at least 3"),
        ({"polygons": (3, 3)}, "must be different numbers"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Config(**wrong)
