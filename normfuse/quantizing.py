"""The quantized engine: decided, written, brought to the score that the user allows, checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from normfuse.accuracy_control import AccuracyControl, Control, Levels
from normfuse.bench.accuracy import Score
from normfuse.build import Engine, check_quantized, write_quantized
from normfuse.built import Workspace
from normfuse.choosing_point import ChoosingPoint, Front, refuse_unlabelled_drop
from normfuse.export.placement import onnx_placement, tensorrt_placement
from normfuse.feeding import Stream
from normfuse.graph import Graph, query
from normfuse.graph.quantization import is_requested, requested_weights
from normfuse.integer_engine import build_integers
from normfuse.measure import Measured, accuracy
from normfuse.mixed_report import realised
from normfuse.mixing import prepare_mixing
from normfuse.planning import Plan, plan_quantization
from normfuse.progress import Progress
from normfuse.quant.bits import MOST, Bits
from normfuse.quant.overrides import Overrides
from normfuse.quant.placement import Placement
from normfuse.quant.target import Target
from normfuse.recipe import Recipe
from normfuse.runtime.instruction_set import detect_instruction_set
from normfuse.target_bits import has_few_by_layer
from normfuse.typed_engine import checked_typed, typed

__all__ = ["Quantizing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizing:
    """Decides, writes and checks the quantized engine; with labels its score decides which blocks get more bits."""

    recipe: Recipe
    samples: Stream
    folder: Workspace
    threads: int
    progress: Progress
    resume: Path | None = None

    def run(self, folded: Graph, what: Measured, total: int) -> tuple[Engine, Control | None]:
        """Return the engine, and the accuracy control where there is a score to control.

        Args:
            folded: the float graph.
            what: the float engine first, and the samples that engines are scored on.
            total: the number of calibration samples.
        """
        if self.recipe.integer_only:
            return self._integers(folded, total), None
        base, _ = accuracy(what, what.engines[0], threads=self.threads)
        plan, front = self._plan(folded, what, base, total)
        if base is None:
            engine, control = self._write(plan), None
        else:
            control = self._control(plan, what, base)
            chosen = control.chosen
            engine = replace(chosen.engine, mixed=realised(chosen.engine.mixed, chosen.plan.graph))
        with self.progress.task("comparing engine and simulation"):
            checked = check_quantized(engine, self.samples, threads=self.threads)
            return replace(checked_typed(checked, self.samples, threads=self.threads), front=front), control

    def _integers(self, folded: Graph, total: int) -> Engine:
        """Return the engine without floats: its blocks have nothing wider to go back to."""
        return build_integers(
            folded,
            self.samples,
            self.folder.model(self.recipe.label),
            recipe=self.recipe,
            total=total,
            threads=self.threads,
            progress=self.progress,
        )

    def _plan(self, folded: Graph, what: Measured, base: Score | None, total: int) -> tuple[Plan, Front]:
        """Return the plan; with mixed bits also the front that it was chosen from, if the user wants one."""
        if not self.recipe.is_mixed:
            plan = plan_quantization(
                folded,
                self.samples,
                recipe=self.recipe,
                placement=self._placement(self._widest),
                placement_of=self._placement,
                total=total,
                progress=self.progress,
                resume=self.resume,
            )
            return plan, ()
        refuse_unlabelled_drop(self.recipe, base)
        mixing = prepare_mixing(
            folded,
            self.samples,
            recipe=self.recipe,
            placement_of=self._placement,
            floating=what.engines[0],
            folder=self.folder,
            threads=self.threads,
            progress=self.progress,
            resume=self.resume,
        )
        choosing = ChoosingPoint(
            mixing=mixing, recipe=self.recipe, write=self._write, what=what, base=base, threads=self.threads
        )
        return choosing.run()

    def _write(self, plan: Plan) -> Engine:
        with self.progress.task("writing the quantized engine"):
            path = self.folder.model(self.recipe.label)
            engine = write_quantized(plan, path, placement=self._placement(self._widest))
            if self.recipe.target is Target.ONNX:
                return engine
            return typed(engine, self.samples, self.recipe.chosen_body, threads=self.threads)

    def _control(self, plan: Plan, what: Measured, base: Score) -> Control:
        scores, label = dict[Path, Score](), self.recipe.label

        def drop_of(engine: Engine) -> float:
            found, _ = accuracy(what, engine.spec(label), threads=self.threads)
            assert found is not None
            scores[engine.path] = found
            return base.drop(found)

        control = AccuracyControl(
            levels=self._levels(),
            allowed=self.recipe.allowed_drop,
            build=self._write,
            drop_of=drop_of,
            progress=self.progress,
            method=self.recipe.calibration,
            untouched=_overridden(plan.graph, self.recipe.chosen_overrides),
        ).run(plan, self.samples)
        return replace(control, scores={what.engines[0].label: base, label: scores[control.chosen.engine.path]})

    def _levels(self) -> Levels:
        if self.recipe.target is Target.TRT:  # blocks of four bits have nothing wider but floats
            return {"float": None}
        asked = self.recipe.precision
        widest = replace(asked, weight=MOST, activation=max(asked.activation, MOST))
        may_be_narrower = self.recipe.is_mixed or bool(self.recipe.overrides)
        wider = {str(widest): self._placement(widest)} if widest != asked or may_be_narrower else {}
        return {**wider, "float": None}

    @property
    def _widest(self) -> Bits:
        """The codes that are asked for first: layers that the target has few bits for get them next."""
        return Bits(MOST, MOST) if has_few_by_layer(self.recipe) else self.recipe.precision

    def _placement(self, bits: Bits) -> Placement:
        if self.recipe.target is Target.TRT:
            return tensorrt_placement(bits, self.recipe.eight_bits)
        return onnx_placement(
            detect_instruction_set().value,
            bits,
            activations=self.recipe.activations,
            weights=self.recipe.weights,
            table_bits=self.recipe.table_bits,
        )


def _overridden(graph: Graph, overrides: Overrides) -> frozenset[str]:
    """Return the linear maps whose bits the user gave, and the requests that they read, by name."""
    maps = [node for node in requested_weights(graph) if overrides.bits_for(query.layer_of(node) or node.name)]
    read = {source.name for node in maps for source in node.all_input_nodes if is_requested(source)}
    return frozenset({node.name for node in maps} | read)
