"""Batches: every image once, whatever the ranks; and how pixels become a batch."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detr_lightning.data.batching import collate, plan_batches
from detr_lightning.data.records import ImageRecord
from detr_lightning.format.preprocessing import resized_size

resize = partial(resized_size, short_side=80, long_side=133)


def records_of(*sizes: tuple[int, int]) -> list[ImageRecord]:
    return [ImageRecord(n, f"{n}.jpg", width, height) for n, (height, width) in enumerate(sizes, 1)]


def ids_of(batches: list[list[ImageRecord]]) -> list[list[int]]:
    return [[record.image_id for record in batch] for batch in batches]


def pixels_in(batch: list[ImageRecord]) -> int:
    sizes = [resize(record.size) for record in batch]
    return len(batch) * max(h for h, _ in sizes) * max(w for _, w in sizes)


sides = st.sampled_from([(60, 80), (80, 60), (48, 64), (50, 50), (40, 75), (75, 40), (1, 3)])
plans = st.fixed_dictionaries(
    {
        "sizes": st.lists(sides, max_size=60),
        "batch_size": st.integers(1, 9),
        "world_size": st.integers(1, 5),
        "batching": st.sampled_from(["exact", "padded"]),
        "seed": st.integers(0, 99),
    }
)


class TestPlanBatches:
    @settings(max_examples=300, deadline=None)
    @given(plan=plans, finished=st.sets(st.integers(1, 60)))
    def test_every_image_once(self, plan: dict[str, object], finished: set[int]) -> None:
        records = records_of(*plan["sizes"])
        shuffled = random.Random(plan["seed"]).sample(records, len(records))
        arguments = (resize, plan["batch_size"], plan["batching"], finished)
        world_size = plan["world_size"]
        ranks = [plan_batches(records, *arguments, rank, world_size) for rank in range(world_size)]
        assert ranks == [plan_batches(shuffled, *arguments, rank, world_size) for rank in range(world_size)]

        batches = [batch for rank in ranks for batch in rank]
        planned = [image_id for batch in ids_of(batches) for image_id in batch]
        assert len(planned) == len(set(planned))
        unfinished = {record.image_id for record in records} - finished
        assert unfinished <= set(planned)
        assert all(1 <= len(batch) <= plan["batch_size"] for batch in batches)
        if plan["batching"] == "exact":
            assert set(planned) == unfinished
            assert all(len({resize(record.size) for record in batch}) == 1 for batch in batches)
        else:
            whole = plan_batches(records, resize, plan["batch_size"], "padded")
            assert all(batch in whole for batch in batches)
            assert all(unfinished & set(ids) for ids in ids_of(batches))

        loads = [sum(map(pixels_in, rank)) for rank in ranks]
        assert max(loads) - min(loads) <= max(map(pixels_in, batches), default=0)
        for rank in ranks:
            costs = list(map(pixels_in, rank))
            assert costs == sorted(costs, reverse=True)

    def test_exact_joins_what_is_resized_to_one_size(self) -> None:
        records = records_of((60, 80), (120, 160), (80, 60), (60, 80))
        assert ids_of(plan_batches(records, resize, 8)) == [[1, 2, 4], [3]]

    def test_ranks_share_a_rare_shape(self) -> None:
        records = records_of(*[(60, 80)] * 4)
        assert [ids_of(plan_batches(records, resize, 8, rank=rank, world_size=2)) for rank in (0, 1)] == [
            [[1, 2]],
            [[3, 4]],
        ]

    def test_padded_keeps_official_neighbours(self) -> None:
        records = records_of((60, 80), (80, 60), (50, 50), (48, 64), (40, 75))
        assert sorted(ids_of(plan_batches(records[::-1], resize, 2, "padded"))) == [[1, 2], [3, 4], [5]]
        assert sorted(ids_of(plan_batches(records, resize, 2, "padded", {1, 2, 3}))) == [[3, 4], [5]]

    def test_fewer_images_than_ranks(self) -> None:
        ranks = [plan_batches(records_of((60, 80)), resize, 8, rank=rank, world_size=3) for rank in range(3)]
        assert sorted(map(len, ranks)) == [0, 0, 1]

    def test_the_work_is_shared_by_area(self) -> None:
        records = records_of(*[(80, 133)] * 10, *[(80, 80)] * 20)
        loads = [sum(map(pixels_in, plan_batches(records, resize, 2, rank=rank, world_size=2))) for rank in range(2)]
        assert max(loads) < 1.05 * min(loads)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"batch_size": 0}, r"data\.batch_size is 0"),
            ({"batching": "exakt"}, r"data\.batching is 'exakt'.*Did you mean 'exact'"),
            ({"rank": 2, "world_size": 2}, "rank is 2"),
        ],
    )
    def test_refusals(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            plan_batches(records_of((60, 80)), resize, **({"batch_size": 8} | arguments))


def picture(record: ImageRecord) -> tuple[ImageRecord, torch.Tensor, tuple[int, int]]:
    pixels = torch.randint(0, 256, (record.height, record.width, 3), dtype=torch.uint8)
    return record, pixels.permute(2, 0, 1), record.size


class TestCollate:
    def test_exact(self) -> None:
        items = [picture(record) for record in records_of((6, 8), (6, 8), (6, 8))]
        batch = collate(items, failed=[(9, "empty file")])
        assert list(batch) == ["image_id", "pixels", "input_size", "failed"]
        assert batch["image_id"] == [1, 2, 3]
        assert batch["input_size"] == [(6, 8)] * 3
        assert batch["failed"] == [(9, "empty file")]
        assert batch["pixels"].dtype == torch.uint8
        assert batch["pixels"].is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(batch["pixels"], torch.stack([pixels for _, pixels, _ in items]), rtol=0, atol=0)

    def test_exact_refuses_other_sizes(self) -> None:
        with pytest.raises(ValueError, match=r"\[\(6, 8\), \(8, 6\)\] need data\.batching padded"):
            collate([picture(record) for record in records_of((6, 8), (8, 6))])

    def test_padded(self) -> None:
        items = [picture(record) for record in records_of((6, 8), (9, 4))]
        batch = collate(items, padded=True)
        assert batch["pixels"].shape == (2, 3, 9, 8)
        assert batch["pixels"].is_contiguous(memory_format=torch.channels_last)
        assert batch["padding_mask"].shape == (2, 9, 8)
        for index, (_, pixels, (height, width)) in enumerate(items):
            assert batch["pixels"][index, :, :height, :width].equal(pixels)
            valid = ~batch["padding_mask"][index]
            assert valid[:height, :width].all()
            assert valid.sum() == height * width
            assert not batch["pixels"][index][:, ~valid].any()

    @pytest.mark.parametrize("padded", [False, True])
    def test_nothing_to_join(self, padded: bool) -> None:
        batch = collate([], padded, [(1, "empty file")])
        assert batch["pixels"].shape == (0, 3, 0, 0)
        assert batch["image_id"] == batch["input_size"] == []
        assert batch["failed"] == [(1, "empty file")]
        assert ("padding_mask" in batch) is padded
