"""Problems in two levels on real data, ready to run: what bilevel methods are tried on.

hyper_cleaning         weights of training examples, 40 % of whose labels are wrong, judged on a few clean ones
weight_decay           one ridge coefficient for each column, judged on held-out patients
hyper_representation   features above, a head for each of many few-shot tasks below
letters                a recurrent network over letters above, a linear head below: an upper level of unbounded smoothness

task = hyper_cleaning(seed=0)
method = PenaltyBilevel(task.levels, task.x, task.theta, lr=200.0, inner_lr=1.0, inner_steps=3)
method.run(500, task.batches(lower=128, seed=0))
task.scores(method.x, method.theta)
"""

from __future__ import annotations

from poise.tasks.bilevel.cleaning import HyperCleaning, hyper_cleaning
from poise.tasks.bilevel.letters import letters
from poise.tasks.bilevel.representation import HyperRepresentation, hyper_representation
from poise.tasks.bilevel.task import BilevelTask
from poise.tasks.bilevel.weight_decay import weight_decay

__all__ = [
    "BilevelTask",
    "HyperCleaning",
    "HyperRepresentation",
    "hyper_cleaning",
    "hyper_representation",
    "letters",
    "weight_decay",
]
