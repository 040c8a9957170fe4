"""The samples of a single run: what the model writes at each stage, for the console, result.json and samples.md."""

from typing import TYPE_CHECKING

from lib.config.plan import Plan
from lib.evaluation import samples
from lib.evaluation.samples import Continuation, Prompt
from lib.files import digest_of_json
from lib.reporting.console import Report
from lib.storage.atomic import atomic_file
from lib.storage.output_folder import SAMPLES

if TYPE_CHECKING:
    from lib.runs.single import Workspace


class SampleStages:
    """What the model of a workspace writes after the prompts at each stage of one run; nothing without prompts."""

    def __init__(self, report: Report, workspace: "Workspace", key: object, is_cell: bool):
        """`key`: what prompts come of, beside the model; a stopped run may go on with others. A cell has no samples."""
        self.written: dict[str, list[Continuation]] = {}  # by stage
        self._report, self._workspace, self._digest = report, workspace, digest_of_json({"of": key})[:16]
        self._is_on = not is_cell and report.is_first and bool(workspace.prompts)

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts; kept, since a chat template may tell the date."""
        kept = self._workspace.state.once(f"prompts {self._digest}", lambda: self._workspace.prompts)
        return [Prompt(*one) for one in kept]

    def measure(self, stage: str, plan: Plan | None = None) -> None:
        """Lets the model as it is, under a plan if given, continue the prompts; in the first process only."""
        workspace, decoder = self._workspace, self._workspace.decoder
        if self._is_on and decoder.is_on_disk:
            self._is_on = False
            self._report.print("Samples     none: every new token would read all layers from disk")
        if not self._is_on:
            return

        def write() -> list[Continuation] | str:
            under, at_once = plan or Plan(decoder.num_layers), workspace.batcher.size * workspace.seqlen
            with self._report.progress(len(self.prompts), "samples") as progress:
                return samples.write(decoder, under, self.prompts, workspace.tokenizer, at_once, progress)

        with self._report.timed("samples"):
            written = workspace.state.once(f"samples {self._digest} of {stage}", write)
        if isinstance(written, str):
            self._report.print(f"Samples     none of the {stage} model: {written}")
        else:
            self.written[stage] = [Continuation(*one) for one in written]

    def show(self) -> dict:
        """Prints the counts of all stages; returns the fields of result.json that this gives."""
        for line in samples.describe(self.written):
            self._report.print(line)
        return {"samples": samples.as_field(self.prompts, self.written)} if self.written else {}

    def text(self, heading: str = "#") -> str:
        """The content of samples.md, below such a heading; empty where nothing was written."""
        return samples.markdown(samples.as_field(self.prompts, self.written), heading) if self.written else ""

    def write(self) -> None:
        """Writes samples.md, in place of an earlier one."""
        self._report.discard(SAMPLES)
        if text := self.text():
            with atomic_file(self._report.folder / SAMPLES) as draft:
                draft.write_text(text, encoding="utf-8")
