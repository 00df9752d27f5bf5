"""Claim of paper 65: weights that follow the front, or the gradients' influence, beat fixed weights on several rewards.

Bandits: ten contexts, eight actions, six shared features, three binary rewards of which one is sparse; RLOO with 80 episodes
a step, SGD, 200 steps; twelve bandits. Every fifth checkpoint is measured exactly, and a run is worth the volume that its checkpoints
dominate above the initial policy. Side by side:

    fixed          the seven points of a grid on the simplex
    merged         the mean of the parameters of the three single-objective policies
    random         weights drawn anew in every step
    B              influence weights at three strengths of the hold, of which the best one counts, as the claim says "best mu"
    A              hypervolume guidance of equal weights (RLOO feels the scale), and fixed weights at A's own mean multiplier:
                   after normalisation A is a step-size rule, and a smaller step must not be taken for its effect. A validates on
                   40 episodes a step; with the same episodes in all it makes 133 steps, which is reported beside.

The claim fails where a rule is below what it is compared with in the mean, or better in no more than half of the bandits (B: not
worse). The learning rate is the best of five for equal weights on eight other bandits, on which the strengths of B were chosen too.
Two things were changed after figures had been seen, and both are told. Six bandits became twelve: of six, guidance was better in
2. And guidance, which had been judged by its wins alone, is judged by the mean as well, as influence is: of twelve it was better
in 7, which is chance, and lower in the mean.

Additions: a small language model adds two digits, rewarded for being right, brief and well laid out, under GRPO, RLOO and
REINFORCE++ with Adam; volumes of sampled checkpoints above 0, because brevity and format pull apart and hardly a checkpoint is better
than the prior in all three. There B is compared with equal and accuracy-heavy
weights. Their settings (the reference 0, lr/mu of 0.1, clipped gradients, whitened REINFORCE) were set after a first run whose volumes
were all near 0. They are reported, not judged: one seed cannot be. `--full`: five seeds and twice the steps, 24 bandits, and every
method on the deep sea and the gathering too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from poise.claims import Claim, Finding, Progress
from poise.insight.checkpoint_fronts import ParetoPaths, pareto_paths
from poise.metrics.pareto import hypervolume
from poise.quantities import derive
from poise.readouts.on_policy import OnPolicy
from poise.readouts.tokens import TokenReadout
from poise.solvers.torch_optimizers import SGD
from poise.tasks.digit_addition import (
    REWARD_NAMES,
    addition_prompts,
    answer,
    fit_addition,
    measure_additions,
    score_additions,
)
from poise.tasks.reward_environments import SharedBandit, Walk, deep_sea_treasure, measured, resource_gathering
from poise.training import fit
from poise.weights.pareto import GradientInfluence, HypervolumeGuidance
from poise.weights.pareto.baselines import RandomWeights

Environment = SharedBandit | Walk
SEEDS, STEPS, EVERY, SAMPLES, RATE, VALIDATION = 12, 200, 5, 8, 0.5, 4
STRENGTHS = (0.3, 1.0, 10.0)
"""lr/mu of rule B."""
TEMPERATURE = 1e-3
"""Of rule A: gains of a step are of this size, on rewards in [0, 1]."""
EQUAL, RANDOM, MERGED, A, A_FIXED, A_BUDGET = "equal", "random", "merged", "A", "fixed at A's mean", "A, same episodes"
ADDITION_STEPS, ADDITION_EVERY, ADDITION_RATE, ADDITION_STRENGTH = 60, 10, 1e-3, 0.1
LOSSES = {"grpo": "grpo(R)", "rloo": "rloo(R)", "reinforce": "reinforce(baseline='whitened', R)"}

# Volumes above a corner: from the initial policy every gain of one reward costs another, and nothing dominates it.
WALKS: dict[str, tuple[Walk, float, tuple[float, ...]]] = {
    "sea": (deep_sea_treasure(), 0.02, (0.0, -25.0)),
    "gathering": (resource_gathering(), 2.0, (-0.1, -0.1, -1.0, -1.1)),
}
"""Environment, learning rate and reference of the walks."""


def grid(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return fixed weights by name: the corners of the simplex, the middles of its edges, and its centre."""
    m = len(names)
    points = {f"only {n}": {n: 1.0} for n in names}
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    points |= {f"{a} and {b}": {a: 0.5, b: 0.5} for a, b in pairs}
    return {**points, EQUAL: dict.fromkeys(names, 1 / m)}


def rewards(weights: Mapping[str, float]) -> str:
    """Return a reward as a weighted sum, as a formula."""
    return " + ".join(f"{w!r}*score.on(reward='{n}').named('{n}')" for n, w in weights.items())


def under(loss: str, weights: Mapping[str, float]) -> str:
    """Return a policy gradient whose reward is a weighted sum, as a formula."""
    return LOSSES[loss].replace("R", f"reward={rewards(weights)}")


def apart(loss: str, names: Sequence[str]) -> str:
    """Return one policy gradient for each reward, from the same answers, as a formula."""
    each = [LOSSES[loss].replace("R", f"reward=score.on(reward='{n}')") for n in names]
    return " + ".join(f"{term}.named('{n}')" for term, n in zip(each, names, strict=True))


@dataclass
class Path:
    """What one run went through: objectives at its checkpoints, weights, and the model it ended with."""

    points: list[list[float]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    model: nn.Module | None = None
    multiplier: float = 1.0


class Checkpoints:
    """Measures the model before the first step and every few steps from then on."""

    def __init__(self, measure: Any, every: int, path: Path, policy: Any = None) -> None:
        self.measure, self.every, self.path, self.policy = measure, every, path, policy

    def on_begin(self, state: Any) -> None:
        self._look(state)

    def on_step_end(self, state: Any) -> None:
        if state.step % self.every == 0:
            self._look(state)

    def _look(self, state: Any) -> None:
        self.path.points.append(self.measure(state.model))
        if isinstance(self.policy, GradientInfluence) and state.step:
            self.path.weights.append(self.policy.current.tolist())


# ---- small environments -----------------------------------------------------------------------------------------------------


def _small(
    env: Environment,
    formula: str,
    seed: int,
    *,
    rate: float = RATE,
    steps: int = STEPS,
    policy: Any = None,
    evaluate: Any = None,
) -> Path:
    path = Path(model=env.agent())
    stream = OnPolicy(
        env.prompts, env.draw, env.score, samples=SAMPLES if env.prompts > 1 else 80, batch_size=env.prompts
    )
    looking = Checkpoints(lambda agent: env.returns(agent).tolist(), EVERY, path, policy)
    assert path.model is not None
    fit(
        path.model, formula, {"main": stream}, readout=TokenReadout(), solver=SGD(lr=rate), steps=steps, seed=seed, device="cpu",
        policy=policy, evaluate=evaluate, validate_every=1 if evaluate else steps, callbacks=[looking],
    )  # fmt: skip
    return path


def _guided(env: Environment, names: Sequence[str], seed: int, rate: float) -> Path:
    """Run rule A on equal weights, its validation on sampled episodes."""
    generator = torch.Generator().manual_seed(derive(seed, "validation"))
    guidance = HypervolumeGuidance(", ".join(names), temperature=TEMPERATURE)
    per_prompt = VALIDATION * 10 // env.prompts

    def evaluate(agent: nn.Module) -> dict[str, float]:
        return measured(env, agent, per_prompt, generator)

    formula = "auto*" + under("rloo", grid(names)[EQUAL])
    path = _small(env, formula, seed, rate=rate, policy=guidance, evaluate=evaluate)
    path.multiplier = guidance.mean
    return path


def _methods(env: Environment, seed: int, rate: float = RATE) -> Iterator[tuple[str, Path]]:
    """Run every method on one environment."""
    names, singles = env.names, []
    for name, weights in grid(names).items():
        path = _small(env, under("rloo", weights), seed, rate=rate)
        singles += [path.model] if name.startswith("only") else []
        yield name, path
    yield MERGED, Path([env.returns(env.agent()).tolist(), env.returns(_mean(singles)).tolist()])
    yield RANDOM, _small(env, apart("rloo", names), seed, rate=rate, policy=RandomWeights("dirichlet", seed=seed))
    for strength in STRENGTHS:
        policy = GradientInfluence(mu=rate / strength)
        yield f"B {strength:g}", _small(env, apart("rloo", names), seed, rate=rate, policy=policy)
    guided = _guided(env, names, seed, rate)
    yield A, guided
    yield A_FIXED, _small(env, under("rloo", grid(names)[EQUAL]), seed, rate=rate * guided.multiplier)
    paid = STEPS * SAMPLES // (SAMPLES + VALIDATION) // EVERY + 1
    yield A_BUDGET, Path(guided.points[:paid])


def _mean(models: Sequence[nn.Module | None]) -> nn.Module:
    """Merge models: the mean of their parameters."""
    states = [m.state_dict() for m in models if m is not None]
    merged = copy.deepcopy(models[0])
    assert merged is not None
    merged.load_state_dict(
        {k: torch.stack([s[k] for s in states]).mean(0) if v.is_floating_point() else v for k, v in states[0].items()}
    )
    return merged


# ---- the language model -----------------------------------------------------------------------------------------------------


def _additions(prior: nn.Module, seed: int, steps: int, full: bool) -> dict[str, Path]:
    heavy = {"accuracy": 0.8, "brevity": 0.1, "format": 0.1}
    equal = grid(REWARD_NAMES)[EQUAL]
    found = {}
    for loss in LOSSES:
        found[f"{loss} equal"] = _language(prior, under(loss, equal), seed, steps)
        if loss == "rloo" or full:
            found[f"{loss} heavy"] = _language(prior, under(loss, heavy), seed, steps)
        policy = GradientInfluence(mu=ADDITION_RATE / ADDITION_STRENGTH, clip=1.0)
        found[f"{loss} B"] = _language(prior, apart(loss, REWARD_NAMES), seed, steps, policy)
    return found


def _language(prior: nn.Module, formula: str, seed: int, steps: int, policy: Any = None) -> Path:
    path, model = Path(), copy.deepcopy(prior)
    stream = OnPolicy(addition_prompts(), answer, score_additions, samples=SAMPLES, batch_size=16)

    def measure(model: nn.Module) -> list[float]:
        scores = measure_additions(model, derive(seed, "checkpoints"), samples=3)
        return [scores[name] for name in REWARD_NAMES]

    fit(
        model, formula, {"main": stream}, readout=TokenReadout(), solver="adam", lr=ADDITION_RATE, clip=1.0, steps=steps, seed=seed,
        device="cpu", policy=policy, callbacks=[Checkpoints(measure, ADDITION_EVERY, path, policy)],
    )  # fmt: skip
    return path


# ---- the study ----------------------------------------------------------------------------------------------------------------


def run(*, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
    """Compare the rules with fixed weights on twelve bandits, then on a language model (`full`: more of everything)."""
    bandits = [SharedBandit(seed=seed + i) for i in range(2 * SEEDS if full else SEEDS)]
    tell = progress if progress is not None else lambda share, text: None
    paths: list[dict[str, Path]] = []
    for i, bandit in enumerate(bandits):
        tell(0.6 * i / len(bandits), f"bandit {i + 1} of {len(bandits)}")
        paths.append(dict(_methods(bandit, seed + i)))
    volumes = [_volumes(each) for each in paths]
    language: list[dict[str, Path]] = []
    for i in range(5 if full else 1):
        tell(0.6 + 0.4 * i / (5 if full else 1), f"additions, seed {seed + i}")
        prior = fit_addition(seed + i)
        language.append(_additions(prior, seed + i, (2 if full else 1) * ADDITION_STEPS, full))
    walks: dict[str, dict[str, float]] = {}
    if full:
        for name, (walk, rate, low) in WALKS.items():
            tell(0.95, name)
            walks[name] = _volumes(dict(_methods(walk, seed, rate)), low)
    return _judge(
        Study(volumes, paths, [_volumes(each, [0.0] * len(REWARD_NAMES)) for each in language], language, walks)
    )


@dataclass(frozen=True)
class Study:
    """What was measured: volumes and paths by method, on every bandit, for every seed of the additions, and on the walks."""

    bandits: Sequence[Mapping[str, float]]
    paths: Sequence[Mapping[str, Path]]
    additions: Sequence[Mapping[str, float]] = ()
    addition_paths: Sequence[Mapping[str, Path]] = ()
    walks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def mean(self) -> dict[str, float]:
        """The mean volume of each method over bandits."""
        return {name: fmean(v[name] for v in self.bandits) for name in self.bandits[0]}

    @property
    def best(self) -> str:
        """Rule B at its best strength."""
        return max((f"B {s:g}" for s in STRENGTHS), key=lambda name: self.mean[name])

    @property
    def wins(self) -> tuple[int, int]:
        """In how many bandits B is not below equal weights, and A above fixed weights at its mean multiplier."""
        return (
            sum(v[self.best] >= v[EQUAL] for v in self.bandits),
            sum(v[A] > v[A_FIXED] for v in self.bandits),
        )

    @property
    def multiplier(self) -> float:
        """The mean multiplier of rule A."""
        return fmean(each[A].multiplier for each in self.paths)

    @property
    def lowest(self) -> float:
        """The mean of the smallest influence weight at the end."""
        return fmean(min(each[self.best].weights[-1]) for each in self.paths)

    @property
    def front_steps(self) -> dict[str, float]:
        """The mean step of a method's checkpoints on the common front; the last step where it has none there."""
        reports = [report(each) for each in self.paths]
        means = {name: [r.runs[name].mean_step for r in reports] for name in (EQUAL, self.best, A)}
        return {name: fmean(STEPS if step is None else step for step in found) for name, found in means.items()}


def _volumes(paths: Mapping[str, Path], above: Sequence[float] | None = None) -> dict[str, float]:
    """Return the volume of each run's checkpoints above a reference, by default the initial model."""
    return {
        name: hypervolume(torch.tensor(p.points, dtype=torch.float64), p.points[0] if above is None else above)
        for name, p in paths.items()
    }


def report(paths: Mapping[str, Path]) -> ParetoPaths:
    """Return fronts and their owners of runs of one length: the data of a picture of the front."""
    points: dict[str, Tensor] = {n: torch.tensor(p.points) for n, p in paths.items() if n not in (MERGED, A_BUDGET)}
    count = len(next(iter(points.values())))
    return pareto_paths(points, [EVERY * i for i in range(count)])


def _judge(study: Study) -> Finding:
    reasons = list(_failures(study))
    figures = {f"bandits/{name}": v for name, v in study.mean.items()}
    figures |= {"bandits where influence is not below equal weights": study.wins[0]}
    figures |= {"bandits where guidance beats its mean": study.wins[1]}
    figures |= {"mean multiplier": study.multiplier, "smallest influence weight": study.lowest}
    figures |= {f"front step/{name}": value for name, value in study.front_steps.items()}
    for name in study.additions[0] if study.additions else ():
        figures[f"additions/{name}"] = fmean(v[name] for v in study.additions)
        path = study.addition_paths[0][name]
        figures |= {f"additions/{name}/{r}": v for r, v in zip(REWARD_NAMES, path.points[-1], strict=True)}
        if path.weights:
            figures |= {
                f"additions/{name}/weight of {r}": w for r, w in zip(REWARD_NAMES, path.weights[-1], strict=True)
            }
    figures |= {f"{where}/{name}": v for where, found in study.walks.items() for name, v in found.items()}
    reason = "; ".join([*reasons, *_remarks(study)])
    return Finding("fails" if reasons else "holds", _line(study), reason, figures)


def _line(study: Study) -> str:
    mean, n, steps = study.mean, len(study.bandits), study.front_steps
    v = {name: f"{1e3 * volume:.2f}" for name, volume in mean.items()}
    fixed = sorted(
        (mean[name], v[name]) for name in mean if name.startswith("only") or " and " in name or name == EQUAL
    )
    strengths = " / ".join(v[f"B {s:g}"] for s in STRENGTHS), " / ".join(f"{s:g}" for s in STRENGTHS)
    tokens = {
        name: fmean(each[name] for each in study.additions) for name in (study.additions[0] if study.additions else ())
    }
    return (
        f"volume of the checkpoints on {n} bandits (1e-3): equal weights {v[EQUAL]}, grid {fixed[0][1]} to {fixed[-1][1]}, random "
        f"{v[RANDOM]}, merged {v[MERGED]}; influence {strengths[0]} at lr/mu {strengths[1]}, the best not below equal weights in "
        f"{study.wins[0]} of {n}; hypervolume guidance {v[A]} against {v[A_FIXED]} of fixed weights at its mean multiplier "
        f"{study.multiplier:.2f} (better in {study.wins[1]} of {n}), {v[A_BUDGET]} when its validation is paid for. Mean step of the "
        f"checkpoints on the common front: {steps[EQUAL]:.0f} equal, {steps[study.best]:.0f} influence, {steps[A]:.0f} guidance. "
        f"Additions, volume (1e-3): {', '.join(f'{name} {1e3 * found:.1f}' for name, found in tokens.items())} "
        "(paper, Math500 with Qwen3-8B: accuracy 0.832 -> 0.850 under guidance; influence 6.1 steps fewer to the front)"
    )


def _failures(study: Study) -> Iterator[str]:
    mean, n, (wins_b, wins_a) = study.mean, len(study.bandits), study.wins
    if mean[study.best] < mean[EQUAL] or 2 * wins_b < n:
        yield (
            f"influence weights at their best mu make {1e3 * mean[study.best]:.2f} against {1e3 * mean[EQUAL]:.2f} of equal weights, and "
            f"are not below them in {wins_b} of {n} bandits only"
        )
    if mean[A] < mean[A_FIXED] or 2 * wins_a <= n:
        yield (
            f"guidance makes {1e3 * mean[A]:.2f} against {1e3 * mean[A_FIXED]:.2f} of fixed weights at its mean multiplier, and is "
            f"better in {wins_a} of {n} bandits: what it does is the size of the step"
        )


def _remarks(study: Study) -> Iterator[str]:
    mean = study.mean
    if mean[A] < mean[EQUAL]:
        yield "guidance stays below equal weights at the full step: its multiplier rests at one half"
    if mean[RANDOM] >= mean[study.best]:
        yield "weights drawn at random do as well as influence weights"
    if study.additions:
        below = [loss for loss in LOSSES if fmean(v[f"{loss} B"] - v[f"{loss} equal"] for v in study.additions) < 0]
        if below:
            yield f"on the additions influence is below equal weights under {', '.join(below)}: accuracy takes most of the weight"
    yield f"the smallest influence weight ends at {study.lowest:.2g} in the mean"
    for name, found in study.walks.items():
        yield f"{name}: " + ", ".join(f"{method} {v:.4g}" for method, v in found.items())


CLAIM = Claim(
    number=65,
    statement=(
        "Weights learnt from gradient influence, or scaled by the growth of the hypervolume, beat fixed weights under GRPO, RLOO and "
        "REINFORCE (Math500, Qwen3-8B: accuracy 0.832 -> 0.850 under guidance, fronts reached 6.1 steps earlier under influence)."
    ),
    expected=(
        "Influence gains a little volume over equal fixed weights and much over the worst fixed ones (a reference study with exact "
        "gradients: 0.0065 to 0.0067 against 0.0063 and 0.0016); guidance gains over fixed weights at its own mean step under RLOO."
    ),
    falsified=(
        "Influence at its best mu is below equal fixed weights in the mean or in most bandits, or guidance is below fixed weights at its "
        "mean multiplier in the mean, or better in no more than half of the bandits."
    ),
    run=run,
)
