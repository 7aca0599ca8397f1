"""The mechanism that every private patient goes through, and the ledger that states what it spent."""

from cardiac_ldm.privacy.accounting import Mechanism, epsilon_pld, epsilon_prv
from cardiac_ldm.privacy.budget import Record
from cardiac_ldm.privacy.dpsgd import PrivatePlan, Randomness
from cardiac_ldm.privacy.ledger import Ledger, Standing, public_ledger

__all__ = [
    "Ledger",
    "Mechanism",
    "PrivatePlan",
    "Randomness",
    "Record",
    "Standing",
    "epsilon_pld",
    "epsilon_prv",
    "public_ledger",
]
