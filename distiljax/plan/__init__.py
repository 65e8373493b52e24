"""Will a run fit, and what will it cost: the train step compiled for a machine that is not there."""

from distiljax.plan.planner import make_plan

__all__ = ["make_plan"]
