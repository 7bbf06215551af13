"""Compression of what workers push and pull, whatever carries it.

`COMPRESSIONS` names them for the command line: ``int8:block=256``, ``top-k:share=0.01``, ….

    bf16, fp16    half the bytes            close: nothing is kept
    int8          a quarter                 close; feedback unless it is left out
    qsgd          2, 4 or 8 bits            right on average
    random-k      a share                   right on average, or feedback
    top-k, sign, powersgd                   feedback: without it they can lead to a wrong place
"""

from __future__ import annotations

from paramserver.compression.base import Compression, Compressor, Slice
from paramserver.compression.ends import Agreed, ShardEnd, agreed_by
from paramserver.compression.low_rank import PowerSGD
from paramserver.compression.payload import Payload
from paramserver.compression.quantised import QSGD, ScaledSign
from paramserver.compression.rounding import BFloat16, Float16, Int8
from paramserver.compression.sparse import RandomK, TopK
from paramserver.compression.wire import Feedback, Traffic, Wire, compressor_of, wire_bytes
from paramserver.registry import Registry

__all__ = [
    "COMPRESSIONS",
    "QSGD",
    "Agreed",
    "BFloat16",
    "Compression",
    "Compressor",
    "Feedback",
    "Float16",
    "Int8",
    "Payload",
    "PowerSGD",
    "RandomK",
    "ScaledSign",
    "ShardEnd",
    "Slice",
    "TopK",
    "Traffic",
    "Wire",
    "agreed_by",
    "check_pull",
    "compressor_of",
    "wire_bytes",
]

COMPRESSIONS: Registry[Compression] = Registry("compression")
COMPRESSIONS.register("bf16", BFloat16, source="Kalamkar et al., 2019, arXiv:1905.12322")
COMPRESSIONS.register("fp16", Float16, source="IEEE 754-2008, binary16")
COMPRESSIONS.register("int8", Int8, source="Dettmers, ICLR 2016, arXiv:1511.04561")
COMPRESSIONS.register("top-k", TopK, source="Aji & Heafield, EMNLP 2017, arXiv:1704.05021")
COMPRESSIONS.register("random-k", RandomK, source="Stich et al., NeurIPS 2018, arXiv:1809.07599")
COMPRESSIONS.register("sign", ScaledSign, source="Karimireddy et al., ICML 2019, arXiv:1901.09847")
COMPRESSIONS.register("qsgd", QSGD, source="Alistarh et al., NeurIPS 2017, arXiv:1610.02132")
COMPRESSIONS.register("powersgd", PowerSGD, source="Vogels et al., NeurIPS 2019, arXiv:1905.13727")


def check_pull(compression: Compression) -> None:
    """Raise ValueError if workers cannot be shown parameters through ``compression``."""
    if not (compression.is_close or compression.feedback):
        name = COMPRESSIONS.name_of(compression)
        raise ValueError(
            f"compress_pull {name} without feedback would show workers parameters most of which "
            f"are wrong: use {name}:feedback=true, which sends what has changed, or bf16, fp16, "
            "int8 or qsgd"
        )
