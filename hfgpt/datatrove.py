"""`hfgpt prepare` as a block of a datatrove pipeline, which its executors run locally, on SLURM, Ray or HF Jobs.

Every task writes one part; the last one to finish completes the data. Train with `--data.path OUTPUT_FOLDER`.

Example:

    LocalPipelineExecutor(
        [JsonlReader("texts/"), GopherQualityFilter(), PrepareTokens("s3://bucket/tokens", "openai-community/gpt2")],
        tasks=64,
    ).run()
"""

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from hfgpt.data.encoding import NO_END, Encoding
from hfgpt.data.parts import Part
from hfgpt.data.prepared import FORMAT_VERSION, Folder, Preparation
from hfgpt.data.report import DataReport
from hfgpt.data.writing import OutputSettings, PartJob, Rules, finish_preparation, start_preparation, tokenize_part
from hfgpt.errors import InputError
from hfgpt.evaluation.generation import unknown_token_id
from hfgpt.tokenizer import load_tokenizer


class PrepareTokens(PipelineStep):
    """Writes the documents of a pipeline as prepared data.

    Args:
        output_folder: Folder or URL; empty, or of the same pipeline.
        tokenizer: As the recipe key `tokenizer.path`.
        validation_fraction: Fraction of the documents for validation. Documents are chosen by a digest of their text,
            so copies of a text go to the same split.
        seed: Seed of the split, as the recipe key `training.seed`.
        source: Name of the source, for the data report and the model card.

    Raises:
        InputError: The folder has other data, or a task is run with another number of tasks.
    """

    name = "hfgpt prepare"
    type = "🔢 - TOKENIZER"

    def __init__(
        self,
        output_folder: str,
        tokenizer: str,
        validation_fraction: float = 0.1,
        seed: int = 42,
        source: str = "datatrove",
    ):
        super().__init__()
        if not 0 < validation_fraction < 1:
            raise InputError(f"validation_fraction is {validation_fraction}; it must be above 0 and below 1")
        self.output_folder, self.tokenizer, self.source = output_folder, tokenizer, source
        self.rules = Rules("text", seed, validation_fraction)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Writes the documents of one task.

        Args:
            data: The documents.
            rank: Number of the task.
            world_size: Number of tasks.
        """
        tokenizer = load_tokenizer(self.tokenizer)
        if tokenizer.eos_token_id is None:
            raise InputError(NO_END)
        encoding, folder = Encoding.of(tokenizer), Folder(self.output_folder)
        preparation = Preparation(
            version=FORMAT_VERSION,
            source=self.source,
            sources=[self.source],
            source_sha256="",  # unknown: the pipeline may do anything
            tokenizer_sha256=encoding.sha256,
            settings={"data.validation_fraction": self.rules.validation_fraction, "training.seed": self.rules.seed},
            split_by="documents",
            parts={"train": world_size},
        )
        start_preparation(folder, preparation, tokenizer)
        part = Part(lambda: ({"text": document.text} for document in data or ()), [rank, world_size])
        job = PartJob(f"train-{rank:05}", "train", part, self.rules)
        with self.track_time(unit="task"):
            record = tokenize_part(
                OutputSettings(self.output_folder, preparation.sha256, encoding, unknown_token_id(tokenizer)), job
            )
        for split, file in record.files.items():
            self.stat_update(f"{split}_tokens", value=file.tokens, unit="task")
            self.stat_update(f"{split}_documents", value=file.documents, unit="task")
        finish_preparation(folder, preparation, DataReport())
        yield from ()
