"""The feature cache: the tower's own numbers, looked up while nothing changed, never when the tower is trained."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from vrag_lib.scale_policy import build_model, build_processor  # noqa: E402
from vrag_lib.vision_cache import remember_features, weights_state  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return build_model(build_processor().tokenizer).eval()


@pytest.fixture
def tower(model):
    tower = model.model.visual
    tower.__dict__.pop("forward", None)
    tower.requires_grad_(False)
    return tower


def images(*grids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    thw = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in grids])
    return torch.randn(int(thw.prod(-1).sum()), 1176, generator=generator), thw


def test_same_features_and_looked_up_the_second_time(model, tower):
    pixels, grid = images((2, 3), (4, 2), (3, 3))
    with torch.no_grad():
        expected = tower(pixels, grid_thw=grid).pooler_output
        cache = remember_features(model)
        first = tower(pixels, grid_thw=grid).pooler_output
        again = tower(pixels, grid_thw=grid).pooler_output
        part = tower(pixels[24:], grid_thw=grid[1:]).pooler_output  # the last two images alone
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-5)
    assert torch.equal(first, again) and torch.equal(part, first[6:])  # bit-equal, whatever else is in the batch
    assert (cache.misses, cache.hits) == (3, 5)
    assert remember_features(model) is cache


def test_the_whole_model_takes_them(model, tower):
    pixels, grid = images((2, 2))
    image = model.config.image_token_id
    ids = torch.tensor([[5, image, image, image, image, 6, 7]])
    kinds = (ids == image).int()
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    with torch.no_grad():
        expected = model(**inputs).logits
    cache = remember_features(model)
    with torch.inference_mode():
        model(**inputs)
    out = model(**inputs).logits  # a graph over features that were computed in inference mode
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=1e-4)
    assert (cache.misses, cache.hits) == (1, 1)
    model.zero_grad()


def test_changed_weights_are_noticed(model, tower):
    pixels, grid = images((2, 2))
    cache = remember_features(model)
    with torch.no_grad():
        before = tower(pixels, grid_thw=grid).pooler_output
        tower.merger.mlp[0].weight.mul_(1.5)
        after = tower(pixels, grid_thw=grid).pooler_output
        tower.merger.mlp[0].weight.div_(1.5)
    assert not torch.equal(before, after) and cache.hits == 0


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_an_optimizer_s_step_is_noticed(model, tower, kind):
    """A fused one, the trainers' default, does not tell by itself."""
    remember_features(model)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight, torch.nn.Parameter(torch.ones(2))], **kind)
    for _ in range(3):
        before = weights_state([weight])
        weight.grad = torch.ones(3)
        optimizer.step()
        assert weights_state([weight]) != before
    before = weights_state([weight])
    optimizer.zero_grad()
    optimizer.step()
    assert weights_state([weight]) == before


def test_a_tower_in_training_is_left_alone(model, tower):
    pixels, grid = images((2, 2))
    cache = remember_features(model)
    tower.requires_grad_(True)
    tower(pixels, grid_thw=grid).pooler_output.sum().backward()
    assert tower.merger.mlp[0].weight.grad is not None and cache.misses == 0
    tower.zero_grad()


def test_least_used_features_go_first(model, tower):
    cache = remember_features(model, max_bytes=2 * 4 * 192 * 4)
    with torch.no_grad():
        for seed in (0, 1, 0, 2, 0, 1):
            pixels, grid = images((2, 2), seed=seed)
            tower(pixels, grid_thw=grid)
    assert (cache.misses, cache.hits) == (4, 2)  # 1 made room for 2


def test_same_pixels_in_another_shape_are_another_image(model, tower):
    pixels, _ = images((2, 3))
    cache = remember_features(model)
    with torch.no_grad():
        for grid in ((1, 4, 6), (1, 6, 4)):
            tower(pixels, grid_thw=torch.tensor([grid]))
    assert cache.misses == 2
