"""Slices against numpy's singular values, and norms that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paramserver.layout import Layout
from workers.landscape import Slice, around, between, filter_normalised, grid, principal

DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def net() -> tuple[Layout, Tensor]:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    model = model.double()
    layout = Layout.of(model)
    origin = torch.zeros(layout.numel, dtype=DOUBLE)
    for i, view in enumerate(layout.views(origin)):
        view.copy_(drawn(*view.shape, seed=i))
    return layout, origin


def test_each_filter_of_a_direction_is_as_long_as_the_parameters_own() -> None:
    layout, origin = net()

    slice_ = filter_normalised(layout, origin, 2, seed=5)

    for direction in slice_.directions:
        named = zip(layout.slots, layout.views(direction), layout.views(origin), strict=True)
        for slot, of_direction, own in named:
            if len(slot.shape) > 1:
                for filter_, mine in zip(of_direction, own, strict=True):
                    assert float(filter_.norm()) == pytest.approx(float(mine.norm()), rel=1e-12)
            else:
                assert not of_direction.any()  # biases, and what batch norm has
    assert not torch.equal(*slice_.directions)


def test_directions_depend_on_the_seed_alone() -> None:
    layout, origin = net()

    one, again, other = (
        filter_normalised(layout, origin, 1, seed=seed).directions for seed in (1, 1, 2)
    )

    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_scaling_a_filter_scales_its_direction_alone() -> None:
    layout, origin = net()
    larger = origin.clone()
    layout.views(larger)[0][1] *= 10

    before, after = (
        filter_normalised(layout, at, 1, seed=3).directions[0] for at in (origin, larger)
    )

    torch.testing.assert_close(layout.views(after)[0][1], 10 * layout.views(before)[0][1])
    layout.views(before)[0][1] = layout.views(after)[0][1] = 0
    assert torch.equal(before, after)


def test_a_model_of_vectors_alone_has_each_for_a_filter() -> None:
    layout = Layout.of(nn.LayerNorm(5).double())
    origin = drawn(layout.numel)

    (direction,) = filter_normalised(layout, origin, 1, seed=0).directions

    for mine, own in zip(layout.views(direction), layout.views(origin), strict=True):
        assert float(mine.norm()) == pytest.approx(float(own.norm()), rel=1e-12)


def test_parameters_that_are_all_0_have_no_random_direction() -> None:
    layout, origin = net()

    with pytest.raises(ValueError, match="and these are all 0: look between"):
        filter_normalised(layout, torch.zeros_like(origin), 1, seed=0)


@pytest.mark.parametrize("number", [1, 2])
def test_principal_directions_are_numpys_singular_vectors(number: int) -> None:
    path, origin = drawn(9, 64).cumsum(0), drawn(64, seed=1)

    slice_, shares = principal(path, origin, number)

    centred = (path - path.mean(0)).numpy()
    _, values, vectors = np.linalg.svd(centred, full_matrices=False)
    for found, expected in zip(slice_.directions.numpy(), vectors[:number], strict=True):
        assert abs(found @ expected) == pytest.approx(1, rel=1e-10)
    np.testing.assert_allclose(shares, values[:number] ** 2 / (values**2).sum(), rtol=1e-10)
    gram = slice_.directions @ slice_.directions.T
    torch.testing.assert_close(gram, torch.eye(number, dtype=DOUBLE))
    assert (slice_.project(path)[0] < slice_.project(path).mean(0)).all()


def test_the_shares_of_a_path_in_a_plane_are_all_there_is() -> None:
    plane = Slice(drawn(64), drawn(2, 64, seed=1))
    path = plane.at(drawn(12, 2, seed=2))

    slice_, shares = principal(path, path[-1], 2)

    assert sum(shares) == pytest.approx(1, rel=1e-9)
    torch.testing.assert_close(slice_.at(slice_.project(path)), path)
    assert slice_.inside(path) == pytest.approx(1, rel=1e-9)


def test_a_straight_path_has_one_direction() -> None:
    path = drawn(64) + torch.arange(5, dtype=DOUBLE)[:, None] * drawn(64, seed=1)

    slice_, shares = principal(path, path[-1], 1)

    assert shares == pytest.approx((1,))
    torch.testing.assert_close(slice_.at(slice_.project(path)), path)
    with pytest.raises(
        ValueError, match=r"^a path of 5 points is not spread out in 2 directions: "
    ):
        principal(path, path[-1], 2)
    with pytest.raises(ValueError, match=r"^a path of 1 points is not spread out in 1 direction: "):
        principal(path[:1], path[0], 1)


@pytest.mark.parametrize("number", [1, 2])
def test_what_is_nearest_in_a_slice_is_perpendicularly_below(number: int) -> None:
    slice_, points = Slice(drawn(64), drawn(number, 64, seed=1)), drawn(5, 64, seed=2)

    coordinates = slice_.project(points)

    rest = points - slice_.at(coordinates)
    torch.testing.assert_close(rest @ slice_.directions.T, torch.zeros(5, number, dtype=DOUBLE))
    ways = points - slice_.origin
    expected = 1 - float(rest.square().sum() / ways.square().sum())
    assert slice_.inside(points) == pytest.approx(expected, rel=1e-10)


def test_points_of_a_slice_are_where_they_are_put() -> None:
    slice_, coordinates = Slice(drawn(64), drawn(2, 64, seed=1)), drawn(7, 2, seed=2)

    torch.testing.assert_close(slice_.project(slice_.at(coordinates)), coordinates)


def test_a_line_between_two_goes_from_0_to_1() -> None:
    first, second = drawn(64), drawn(64, seed=1)

    line = between(first, second)

    ends = line.at(torch.tensor([[0.0], [0.5], [1.0]], dtype=DOUBLE))
    torch.testing.assert_close(ends, torch.stack([first, (first + second) / 2, second]))


def test_a_plane_through_three_holds_them_on_axes_of_one_scale() -> None:
    first, second, third = (drawn(64, seed=i) for i in range(3))

    plane = between(first, second, third)

    assert plane.inside(torch.stack([second, third])) == pytest.approx(1, rel=1e-10)
    coordinates = plane.project(torch.stack([first, second, third]))
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=DOUBLE)
    torch.testing.assert_close(coordinates[:2], expected)
    assert float(coordinates[2, 1]) > 0
    along, aside = plane.directions
    assert float(along @ aside) == pytest.approx(0, abs=1e-9)
    assert float(along.norm()) == pytest.approx(float(aside.norm()))


def test_there_is_no_line_between_the_same_and_no_plane_through_a_line() -> None:
    first, second = drawn(64), drawn(64, seed=1)

    with pytest.raises(ValueError, match=r"^the two sets of parameters are the same"):
        between(first, first)
    with pytest.raises(ValueError, match=r"^the three sets of parameters lie on a line"):
        between(first, second, (first + second) / 2)


def test_bounds_leave_as_much_room_on_all_sides() -> None:
    bounds = around(torch.tensor([[0.0, 1.0], [4.0, 2.0]]), 0.25)

    assert bounds == [(-1.0, 5.0), (0.0, 3.0)]
    assert [axis.tolist() for axis in grid(bounds, 3)] == [[-1, 2, 5], [0, 1.5, 3]]
