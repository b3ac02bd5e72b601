"""Bringing Triton to a target: models are loaded and tried, the ensemble first under a name of its own."""

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from espalier.configs import ensemble_config, ensemble_generation
from espalier.contract import ENSEMBLE, OFFSETS, TOKENIZER, Merged
from espalier.errors import ContractError, WiringError
from serving.control import Control, Refused
from serving.live import Live
from serving.plan import Head, Served

log = logging.getLogger("espalier.wiring")

TRIAL = f"{ENSEMBLE}-trial"
"""An ensemble like the one that is to be, to be asked before anybody else asks it."""
LOADS = 4
"""Models that are loaded at once."""
GRACE = 1.0
"""Seconds between the ensemble's change and the unloading of what it no longer needs."""


class Rejected(Exception):
    """Triton refuses models, or they answer wrongly: reasons by model; `lasting` if trying again is in vain."""

    def __init__(self, reasons: Mapping[str, str], lasting: bool) -> None:
        super().__init__("; ".join(f"{model}: {why}" for model, why in reasons.items()))
        self.reasons, self.lasting = dict(reasons), lasting


class Deployer:
    """Makes the Triton behind `control` serve targets whose models lie in `live`."""

    def __init__(self, live: Live, control: Control) -> None:
        self._live = live
        self._control = control

    def there(self, generation: int) -> tuple[set[str], set[str]]:
        """Return the tasks that Triton serves of this generation, and the models of its ensemble's steps."""
        config = self._control.config(ENSEMBLE)
        try:
            ours = config is not None and ensemble_generation(config) == generation
        except ContractError:  # an ensemble of that name which is not ours
            ours = False
        if config is None or not ours:
            return set(), set()
        tasks = {output.name for output in config.output} - {OFFSETS}
        return tasks, {step.model_name for step in config.ensemble_scheduling.step}

    def restore(self, target: Served, generation: int) -> tuple[Served, dict[str, str]]:
        """Bring back what was served before, but for heads that cannot be loaded any more.

        Returns what is served now, and by model why something is not. Raises Rejected if it is the trunk.
        """
        reasons: dict[str, str] = {}
        while True:
            try:
                self._load(target)
                break
            except Rejected as error:
                lost_groups = {group.model for group in target.groups} & set(error.reasons)
                if lost_groups:
                    log.error("generation %d comes back with heads apart: %s", generation, error)
                    target = target.with_groups(g for g in target.groups if g.model not in lost_groups)
                    reasons |= error.reasons
                    continue
                lost = {task for task, head in target.heads.items() if head.model in error.reasons}
                if not lost:
                    raise
                log.error("generation %d comes back without %s: %s", generation, ", ".join(sorted(lost)), error)
                reasons |= error.reasons
                target = target.only(set(target.heads) - lost)
        self.point(target, generation)
        return target, reasons

    def try_out(self, target: Served, new: Iterable[str], served: Served | None) -> None:
        """Load what `target` needs and ask it everything, `new` heads alone as well; raise Rejected with the culprits.

        What is served now is not touched.
        """
        fresh = target.models - (served.models if served else set())
        trunk = target.trunk.models - (served.trunk.models if served else set())
        heads = {task: target.heads[task] for task in new}
        try:
            self._load(target)
            self._try_heads(target, heads)
            if target.heads:
                self._try_ensemble(target, heads, trunk, fresh)
        except Rejected as error:
            for model in error.reasons:
                if model in fresh:
                    self._control.unload(model)
            raise

    def _load(self, target: Served) -> None:
        """Load what is missing, several at once. Raises Rejected with all that failed."""
        index = self._control.index()
        missing = sorted(model for model in target.models if not index.get(model))
        unseen = [model for model in missing if model not in index]
        if unseen:
            raise self._blind(unseen[0])
        with ThreadPoolExecutor(LOADS) as pool:
            loads = {model: pool.submit(self._control.load, model) for model in missing}
        reasons = {}
        for model, load in loads.items():
            error = load.exception()
            if isinstance(error, Refused):
                self._control.unload(model)  # a model that failed to load would make the server unready
                reasons[model] = str(error)
            elif error is not None:
                raise error
        if reasons:
            raise Rejected(reasons, lasting=False)

    def _try_heads(self, target: Served, heads: Mapping[str, Head]) -> None:
        by_tap = {segment.info.stop: segment.info for segment in target.chain}
        reasons = {}
        for task, head in heads.items():
            if task in target.grouped:
                continue  # it answered alone before it was merged
            try:
                self._control.try_head(head.model, head.info, by_tap[head.info.tap])
            except Refused as error:
                reasons[head.model] = str(error)
        if reasons:
            raise Rejected(reasons, lasting=True)

    def _try_ensemble(self, target: Served, new: Mapping[str, Head], trunk: set[str], fresh: set[str]) -> None:
        """Ask an ensemble like the one that is to be; if it fails, find out by whom.

        `fresh` models are not served now. If neither heads are `new` nor models of the `trunk`, those that are merged
        must answer as the ensemble does now; what fails then may be the ensemble's fault, or the machine's.
        """
        merged = set[str]() if new or trunk else fresh & {group.model for group in target.groups}
        why = self._trial(target, like=ENSEMBLE if merged else None)
        if why is None:
            return
        reasons = dict.fromkeys(merged, f"the ensemble with it fails: {why}")
        for task, head in new.items():
            own = self._trial(target.only({task})) if len(target.heads) > 1 else why
            if own is not None:
                reasons[head.model] = f"the ensemble with it fails: {own}"
        if trunk and len(reasons) == len(new):
            reasons = {model: f"the ensemble with this trunk fails: {why}" for model in trunk}
        elif not reasons:
            models = {head.model for head in new.values()} or fresh
            reasons = dict.fromkeys(models, f"the ensemble fails with it and the others: {why}")
        if not reasons:
            raise WiringError(f"the ensemble fails: {why}")
        raise Rejected(reasons, lasting=not merged)

    def _trial(self, target: Served, like: str | None = None) -> str | None:
        """Return why an ensemble of `target` fails, or answers otherwise than `like`; None if it does not."""
        try:
            self._write(target, 1, TRIAL)
            if TRIAL not in self._control.index():
                raise self._blind(TRIAL)
            self._control.load(TRIAL)
            self._control.try_ensemble(TRIAL, {task: head.info for task, head in target.heads.items()}, like)
        except Refused as error:
            return str(error)
        finally:
            self._control.unload(TRIAL)
        return None

    def point(self, target: Served, generation: int) -> None:
        """Write the ensemble of `target` and load it; without a task there is none."""
        if not target.heads:
            self._control.unload(ENSEMBLE)
            return
        self._write(target, generation, ENSEMBLE)
        try:
            self._control.load(ENSEMBLE)
        except Refused as error:
            raise WiringError(f"{self._control.url} refuses generation {generation} of {ENSEMBLE}: {error}") from error
        if self.there(generation)[0] != set(target.heads):
            raise self._blind(f"generation {generation} of {ENSEMBLE}")

    def _write(self, target: Served, generation: int, name: str) -> None:
        models = {TOKENIZER: target.tokenizer}
        models |= {segment.info.model: segment.model for segment in target.chain}
        models |= {head.info.model: head.model for head in target.heads.values()}
        infos = [head.info for head in target.heads.values()]
        merged = [
            Merged(group.model, group.segment.info if group.segment else None, group.infos, group.answers(target.heads))
            for group in target.groups
        ]
        config = ensemble_config([segment.info for segment in target.chain], infos, generation, models, merged)
        config.name = name
        self._live.write_ensemble(config, generation)

    def _blind(self, what: str) -> WiringError:
        return WiringError(
            f"{self._control.url} does not see {what}: start it with --model-control-mode=explicit and "
            f"--model-repository={self._live.models} (by whatever path it knows that folder)"
        )

    def tidy(self, needed: Collection[str], at_once: bool) -> None:
        """Unload what is not among the models that are `needed`. Models of others are left alone."""
        ready = [model for model, ready in self._control.index().items() if ready]
        surplus = [model for model in ready if model not in {ENSEMBLE, *needed} and self._live.has(model)]
        if surplus and not at_once:
            time.sleep(GRACE)  # requests that began before the ensemble changed
        for model in sorted(surplus, key=lambda model: model != TRIAL):
            self._control.unload(model)
