"""Batches on their way to a device."""

from dataclasses import fields

import torch

from smolvla_shared.batch import Batch, FlowTarget, RawBatch, to_device


def make_raw_batch() -> RawBatch:
    return RawBatch(
        images=[torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)],
        image_mask=torch.ones(2, 2, dtype=torch.bool),
        tasks=["open", "close"],
        state=torch.zeros(2, 4),
        state_mask=torch.ones(2, dtype=torch.bool),
        pairs=None,
        pair_mask=torch.ones(2, 1, dtype=torch.bool),
        actions=torch.zeros(2, 5, 3),
        action_mask=torch.ones(2, 5, dtype=torch.bool),
        noise={"action": torch.zeros(2, 1, 5, 3)},
        time={"action": torch.zeros(2, 1)},
        dataset=[0, 0],
        row=[0, 1],
        keys=["a/0/0", "a/0/1"],
    )


def make_batch() -> Batch:
    targets = {
        "latent": FlowTarget(torch.zeros(2, 4, 8), torch.ones(2, 4) > 0, torch.zeros(2, 3, 4, 8), torch.zeros(2, 3)),
        "action": FlowTarget(torch.zeros(2, 5, 3), torch.ones(2, 5) < 0, torch.zeros(2, 3, 5, 3), torch.zeros(2, 3)),
    }
    ids, valid = torch.zeros(2, 6, dtype=torch.long), torch.ones(2, dtype=torch.bool)
    return Batch(torch.zeros(2, 1, 3, 8, 8), valid[:, None], ids, ids == 0, torch.zeros(2, 32), valid, targets)


def tensors(value) -> list[torch.Tensor]:
    """Every tensor in nested dataclasses, dictionaries and lists, found without to_device."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (Batch, RawBatch, FlowTarget)):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, list) else []


def test_to_device_moves_every_tensor_and_keeps_the_rest():
    raw, batch = make_raw_batch(), make_batch()
    moved_raw, moved = to_device(raw, torch.device("meta")), to_device(batch, torch.device("meta"))
    for before, after, count in [(raw, moved_raw, 10), (batch, moved, 14)]:
        assert type(after) is type(before)
        assert [t.device.type for t in tensors(after)] == ["meta"] * count
        assert [(t.shape, t.dtype) for t in tensors(after)] == [(t.shape, t.dtype) for t in tensors(before)]
        assert {t.device.type for t in tensors(before)} == {"cpu"}
    assert (moved_raw.tasks, moved_raw.keys, moved_raw.pairs) == (raw.tasks, raw.keys, None)


def test_a_raw_batch_pins_every_tensor(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    raw = make_raw_batch()
    assert raw.pin_memory().keys == raw.keys
    assert len(pinned) == len(tensors(raw))


def test_length_is_the_number_of_samples():
    assert len(make_raw_batch()) == len(make_batch()) == 2


def test_masks_are_those_of_the_targets():
    masks = make_batch().masks
    assert {name: (mask.shape, mask.all().item()) for name, mask in masks.items()} == {
        "latent": ((2, 4), True),
        "action": ((2, 5), False),
    }
