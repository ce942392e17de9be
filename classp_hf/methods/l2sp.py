"""L2-SP: every weight is pulled back to where the last task left it (Li, Grandvalet & Davoine 2018)."""

from dataclasses import dataclass

from .base import AnchoredMethod, Context, flag


@dataclass
class L2SP(AnchoredMethod):
    """Penalty `(alpha / 2) * sum_i (w_i - a_i)^2`, a = the weights when the last task ended (arXiv 1802.01483, eq. 2).

    The paper's anchor is the pre-trained model; in a sequence it is the model each task starts from. The first task
    trains freely, as under EWC, so that methods differ only in how they keep it.
    """

    name = "l2sp"
    ranges = {"l2sp_alpha": (">= 0", lambda v: v >= 0)}

    l2sp_alpha: float = flag(0.1, "Strength of the pull, in units of the loss per squared weight.")

    def strength(self) -> float:
        return self.l2sp_alpha

    def after_task(self, context: Context) -> None:
        self.anchor |= {n: p.detach().float().clone() for n, p in self.parameters(context.model)}
