from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detr_lightning.format.reader import TensorReader


def test_single_tensors_are_read_from_any_file_that_torch_reads(tmp_path: Path) -> None:
    reader = TensorReader()
    base = torch.arange(40.0)
    for number, tensors in enumerate(
        [
            {"query_embeddings": base[10:20], "pred_boxes": base[:10]},  # One storage for both.
            {"query_embeddings": base.reshape(4, 10).T, "pred_boxes": torch.zeros(3)},  # Not contiguous.
            {"pred_boxes": torch.zeros(3), "query_embeddings": torch.arange(6)},  # Another order and dtype.
            {"query_embeddings": torch.zeros(0, 4), "pred_boxes": torch.zeros(3)},
        ]
    ):
        path = tmp_path / f"other_{number}.pt"
        torch.save(tensors, path)
        for _ in range(2):
            assert torch.equal(reader.read(path, "query_embeddings"), tensors["query_embeddings"])
    legacy = tmp_path / "legacy.pt"
    torch.save({"query_embeddings": base}, legacy, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"legacy\.pt cannot be read"):  # Cannot be mapped; none of ours is like it.
        reader.read(legacy, "query_embeddings")
