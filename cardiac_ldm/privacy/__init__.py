"""The mechanism that every private patient goes through, and the ledger that states what it spent."""

from cardiac_ldm.privacy.accounting import Ledger, Mechanism, epsilon_pld, epsilon_prv, epsilon_rdp, public_ledger
from cardiac_ldm.privacy.dpsgd import PrivatePlan, Randomness

__all__ = [
    "Ledger",
    "Mechanism",
    "PrivatePlan",
    "Randomness",
    "epsilon_pld",
    "epsilon_prv",
    "epsilon_rdp",
    "public_ledger",
]
