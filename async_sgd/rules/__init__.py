"""Consistency rules: when a push is applied, when it is dropped, and who waits for whom.

Each rule is a specification, a frozen dataclass that the command line names and a record stores,
and a state machine that it builds; `paramserver.rules` says what the machine is told and answers.
"""

from async_sgd.rules.asynchronous import Asynchronous
from async_sgd.rules.bounded import BoundedStaleness
from async_sgd.rules.fedbuff import FedBuff
from async_sgd.rules.gathering import BSP, KofN, NSoftsync
from async_sgd.rules.pieces import Pieces
from async_sgd.rules.rennala import Rennala
from async_sgd.rules.ringleader import Ringleader
from async_sgd.rules.ringmaster import Ringmaster
from async_sgd.rules.ssp import SSP
from async_sgd.rules.sync_switch import SyncSwitch
from paramserver.registry import Registry
from paramserver.rules import RuleSpec

__all__ = [
    "BSP",
    "RULES",
    "SSP",
    "Asynchronous",
    "BoundedStaleness",
    "FedBuff",
    "KofN",
    "NSoftsync",
    "Pieces",
    "Rennala",
    "Ringleader",
    "Ringmaster",
    "SyncSwitch",
]

RULES: Registry[RuleSpec] = Registry("rule")
RULES.register("asp", Asynchronous, source="Dean et al., NIPS 2012")
RULES.register("ssp", SSP, source="Ho et al., NIPS 2013")
RULES.register("bsp", BSP, source="Valiant, CACM 33(8), 1990")
RULES.register("sync-switch", SyncSwitch, source="Li et al., ICDCS 2021, arXiv:2104.08364")
RULES.register(
    "bounded",
    BoundedStaleness,
    source="Koloskova et al., arXiv:2206.08307; Mishchenko et al., arXiv:2206.07638",
)
RULES.register("ringmaster", Ringmaster, source="Maranjyan et al., ICML 2025, arXiv:2501.16168")
RULES.register(
    "ringleader", Ringleader, source="Maranjyan & Richtárik, ICLR 2026, arXiv:2509.22860"
)
RULES.register(
    "k-of-n", KofN, source="Chen et al., arXiv:1604.00981; Dutta et al., arXiv:1803.01113"
)
RULES.register("rennala", Rennala, source="Tyurin & Richtarik, NeurIPS 2023, arXiv:2305.12387")
RULES.register("softsync", NSoftsync, source="Zhang et al., IJCAI 2016, arXiv:1511.05950")
RULES.register("fedbuff", FedBuff, source="Nguyen et al., AISTATS 2022, arXiv:2106.06639")
RULES.register("pieces", Pieces, source="Dean et al., NIPS 2012 (Sandblaster); arXiv:1605.06049")
