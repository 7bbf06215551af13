"""What holds for every compression: a new one is a line in the list."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from paramserver.compression import COMPRESSIONS, Feedback, Payload, Slice, Wire, compressor_of
from paramserver.errors import PluginError, ProtocolError
from paramserver.layout import Layout

NAMES = (
    "bf16", "fp16", "int8", "int8:block=100,feedback=false", "top-k:share=0.05", "top-k:share=1",
    "random-k:share=0.1", "random-k:share=0.1,feedback=true", "sign", "sign:feedback=false",
    "qsgd", "qsgd:levels=7,bucket=100", "qsgd:levels=1", "powersgd", "powersgd:rank=1",
)  # fmt: skip
LAYOUT = Layout.of(nn.Sequential(nn.Linear(40, 33), nn.Conv2d(3, 8, 3), nn.Linear(33, 5)))
CUTS = {"one shard": LAYOUT.cuts(1)[0], "the second of two": LAYOUT.cuts(2)[1]}


def gradient(of: Slice, seed: int = 0) -> Tensor:
    """Some numbers, and 0 where there is padding."""
    drawn = torch.randn(of.numel, generator=torch.Generator().manual_seed(seed), dtype=of.dtype)
    vector = torch.zeros_like(drawn)
    for part in of.parts:
        vector[part.start : part.stop] = drawn[part.start : part.stop]
    return vector


@pytest.fixture(params=CUTS)
def of(request: pytest.FixtureRequest) -> Slice:
    return Slice.of(LAYOUT, CUTS[request.param])


@pytest.mark.parametrize("name", NAMES)
def test_what_was_sent_as_bytes_comes_out_the_same(name: str, of: Slice) -> None:
    compressor = COMPRESSIONS.parse(name).build(of)
    payload = compressor.compress(gradient(of), seed=1)
    here, there = torch.full((2, of.numel), 7.0)

    data = payload.to_bytes()

    compressor.decompress(payload, here)
    COMPRESSIONS.parse(name).build(of).decompress(Payload.from_bytes(data), there)
    assert torch.equal(here, there)
    assert len(data) == payload.num_bytes == compressor.num_bytes
    assert len(payload.raw) == compressor.raw_bytes
    again = compressor.payload_of(payload.raw).tensors
    assert all(torch.equal(a, b) for a, b in zip(again, payload.tensors, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_vector_stays_and_padding_comes_out_as_0(name: str, of: Slice) -> None:
    compressor, vector = COMPRESSIONS.parse(name).build(of), gradient(of)
    before, out = vector.clone(), torch.full((of.numel,), 7.0)

    compressor.decompress(compressor.compress(vector, seed=1), out)

    assert torch.equal(vector, before)
    is_padding = torch.ones(of.numel, dtype=torch.bool)
    for part in of.parts:
        is_padding[part.start : part.stop] = False
    assert is_padding.any()
    assert not out[is_padding].any()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_comes_out_of_nothing(name: str, of: Slice) -> None:
    compressor, out = COMPRESSIONS.parse(name).build(of), torch.full((of.numel,), 7.0)

    compressor.decompress(compressor.compress(torch.zeros(of.numel), seed=1), out)

    assert not out.any()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bytes(name: str, of: Slice) -> None:
    first, second = (COMPRESSIONS.parse(name).build(of) for _ in range(2))

    sent = [
        [one.compress(gradient(of, step), seed=step).to_bytes() for step in range(3)]
        for one in (first, second)
    ]

    assert sent[0] == sent[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_payload_of_another_slice_is_refused_and_nothing_written(name: str, of: Slice) -> None:
    compressor = COMPRESSIONS.parse(name).build(of)
    other = Slice.of(LAYOUT, LAYOUT.cuts(3)[0])
    payload = COMPRESSIONS.parse(name).build(other).compress(gradient(other), seed=1)
    out = torch.full((of.numel,), 7.0)

    with pytest.raises(ProtocolError, match=r"^expected a payload .* got"):
        compressor.decompress(payload, out)

    assert (out == 7).all()


@pytest.mark.parametrize("name", NAMES)
def test_double_precision_is_sent_too(name: str) -> None:
    of = Slice.of(Layout(LAYOUT.slots, torch.float64), CUTS["one shard"])
    compressor, out = COMPRESSIONS.parse(name).build(of), torch.empty(of.numel, dtype=torch.float64)

    compressor.decompress(compressor.compress(gradient(of), seed=1), out)

    assert out.isfinite().all()
    assert out.any()


@pytest.mark.parametrize("name", NAMES)
def test_what_was_sent_and_what_was_not_add_up_to_the_gradients(name: str) -> None:
    """Stich & Karimireddy: x - lr e goes the way of training without compression."""
    of = Slice.of(Layout(LAYOUT.slots, torch.float64), CUTS["one shard"])
    feedback = Feedback(COMPRESSIONS.parse(name).build(of))
    x = gradient(of, 100)
    virtual, lr = x.clone(), 0.1

    for step in range(8):
        grad = gradient(of, step)
        virtual -= lr * grad
        feedback.send_(grad, seed=step)
        x -= lr * grad

        scale = float(feedback.residual.abs().max()) + 1
        torch.testing.assert_close(x - lr * feedback.residual, virtual, rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_shards_are_compressed_apart_and_an_empty_slice_sends_nothing(name: str) -> None:
    compression = COMPRESSIONS.parse(name)
    cuts = (*LAYOUT.cuts(2), range(LAYOUT.numel, LAYOUT.numel))
    wire = Wire(LAYOUT, cuts, compression, None, seed=3, worker=1)
    slots = [gradient(Slice.of(LAYOUT, cut)) for cut in cuts]

    payloads = wire.push_(slots, 5)

    wanted = [compressor_of(compression, Slice.of(LAYOUT, cut)) for cut in cuts]
    assert [p.num_bytes for p in payloads] == [one.num_bytes for one in wanted]
    assert len(payloads[2].raw) == 0
    assert wire.traffic.push.num_bytes == sum(len(p.to_bytes()) for p in payloads)
    assert wire.traffic.push.plain_bytes == LAYOUT.num_bytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", r"^there is no compression 'int9'; did you mean 'int8'\?"),
        ("int8:blocks=3", r"^compression 'int8' has no key 'blocks'; it has block, feedback$"),
        ("int8:block=4", r"^compression 'int8': block must be 8 elements or more, got 4$"),
        ("bf16:feedback=true", r"^compression 'bf16' has no key 'feedback'; it has none$"),
        ("top-k:share=0", r"^compression 'top-k': share must be above 0 and at most 1, got 0\.0$"),
        ("random-k:share=1.5", r"^compression 'random-k': share must be above 0 and at most 1"),
        ("qsgd:levels=128", r"^compression 'qsgd': levels must be 1 to 127, got 128$"),
        ("qsgd:bucket=1", r"^compression 'qsgd': bucket must be 8 elements or more, got 1$"),
        ("powersgd:rank=0", r"^compression 'powersgd': rank must be 1 or more, got 0$"),
        ("sign:feedback=no", r"^compression 'sign': feedback: expected true or false, got 'no'$"),
    ],
)
def test_a_bad_name_or_key_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        COMPRESSIONS.parse(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", r"^a payload of 0 bytes has no whole header$"),
        (lambda data: data[:20], r"^a payload of 20 bytes has no whole header$"),
        (lambda data: data[:-1], r"^a payload of \d+ bytes came as \d+$"),
        (lambda data: data + b"x", r"^a payload of \d+ bytes came as \d+$"),
        (lambda data: data[:4] + b"[" + data[5:], r"^a payload's header cannot be read"),
        (lambda data: data.replace(b"int8\",", b"int7\","), r"^a payload's header cannot be read"),
        (lambda data: b"\xff\xff\xff\xff" + data[4:], r"^a payload of \d+ bytes has no whole"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_payload_are_refused(change: object, message: str) -> None:
    of = Slice.of(LAYOUT, CUTS["one shard"])
    data = COMPRESSIONS.parse("int8").build(of).compress(gradient(of), seed=0).to_bytes()
    assert callable(change)

    with pytest.raises(ProtocolError, match=message):
        Payload.from_bytes(change(data))
