"""Every suite fails when what it guards is broken: deliberate defects, and the test that must name each cause."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import harness.pytest_plugin
from harness.engine import Arm, Engine, EngineSpec, Interface
from harness.goldens import Goldens
from harness.pytest_plugin.subject import EnginePool
from harness.results import Results, TestRecord
from tests.defects import seeded

pytestmark = pytest.mark.timeout(240)  # a broken engine may wait for ever
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Defect:
    """One deliberate mistake.

    Attributes:
        name: function of seeded.py.
        caught_by: the test, `file::name[parameters]` in suites/; the model stands in the brackets.
        message: regular expression that the failure's text must match; it names the cause.
        run: defects of one name here are seeded in one session, to start one engine and not several. They must not
            touch each other's tests.
    """

    name: str
    caught_by: str
    message: str
    run: str = ""

    def __post_init__(self) -> None:
        if not self.run:
            object.__setattr__(self, "run", self.name)

    @property
    def row(self) -> str:
        """Of the table in CONTRIBUTING.md."""
        file, _, test = self.caught_by.partition("::")
        what = (getattr(seeded, self.name).__doc__ or "").strip().removesuffix(".")
        return f"| `{self.name}`: {what} | {file}: `{test.partition('[')[0]}` |"


ROWS = "test_contract_basics.py::test_rows_are_the_items_in_prompt_order[qwen3_vl-False]"
DEFECTS = (
    Defect("item_dropped", ROWS, r"has 6 rows, expected 16(?s:.*)second image", run="basics, once more"),
    Defect("items_swapped", ROWS, "rows 0..9 equal the second image's", run="basics"),
    Defect(
        "rows_widened",
        "test_contract_basics.py::test_a_completion_carries_the_rows_of_its_item[qwen3_vl]",
        "not in the engine's dtype",
    ),
    Defect(
        "lost_on_stop_string",
        "test_contract_basics.py::test_every_way_to_finish_carries_it[qwen3_vl-stop string]",
        "has no mm_embedding: its engine sent none",
        run="basics",
    ),
    Defect(
        "levels_not_cut",
        "test_contract_basics.py::test_levels_come_on_request_and_the_rows_stay_cut[qwen3_vl]",
        "deepstack columns were not cut",
        run="basics",
    ),
    Defect(
        "children_share_memory",
        "test_contract_basics.py::test_every_child_of_n_gets_its_own[qwen3_vl]",
        "completions share memory",
        run="basics, once more",
    ),
    Defect(
        "text_gets_rows",
        "test_contract_basics.py::test_a_text_only_request_in_the_batch_gets_none[qwen3_vl]",
        "a text-only request got an embedding",
        run="basics, once more",
    ),
    Defect(
        "opt_out_ignored",
        "test_contract_basics.py::test_an_opted_out_request_copies_nothing[qwen3_vl]",
        "a request that opted out got an embedding",
        run="basics",
    ),
    Defect(
        "leases_never_end",
        "test_contract_basics.py::test_everything_is_released_at_completion[qwen3_vl]",
        r"still held after completion: .*'leases': [1-9]",
        run="basics",
    ),
    Defect(
        "metrics_count_totals",
        "test_contract_basics.py::test_the_metrics_count_what_is_captured[qwen3_vl]",
        "the metrics do not count what is captured",
        run="basics",
    ),
    Defect(
        "repeats_dropped",
        "test_contract_never_lost.py::test_repeats_in_a_prompt_and_in_a_step[qwen3_vl]",
        "the second image is nowhere",
        run="never lost",
    ),
    Defect(
        "prefill_not_forced",
        "test_contract_never_lost.py::test_prefix_cache_hit_on_an_item_that_was_not_captured[qwen3_vl]",
        "an item was not captured",
        run="never lost",
    ),
    Defect(
        "reuse_loads_rows_shifted",
        "test_contract_never_lost.py::"
        "test_an_evicted_item_is_loaded_instead_of_encoded_where_that_is_asked_for[qwen3_vl]",
        "the language model was given something else",
    ),
    Defect("stale_tensor", "test_contract_never_lost.py::test_preemption[qwen3_vl]", "equal request 0"),
    Defect(
        "captures_when_idle",
        "test_contract_arms.py::test_tokens_and_logprobs_are_those_without_the_plugin[qwen3_vl-idle]",
        "captured=True where the plugin is idle",
    ),
    Defect(
        "model_gets_rounded_rows",
        "test_contract_arms.py::test_tokens_and_logprobs_are_those_without_the_plugin[qwen3_vl-capturing]",
        "other logprobs where the plugin is capturing",
    ),
    Defect(
        "lost_when_merged",
        "test_contract_streaming.py::test_only_the_final_output_carries_it[qwen3_vl-DELTA-slow consumer]",
        "the final output has no mm_embedding",
        run="streaming",
    ),
    Defect(
        "aborted_requests_never_released",
        "test_contract_streaming.py::test_aborts_leave_nothing[qwen3_vl]",
        r"still held after the aborts: .*'admitted': [1-9]",
        run="streaming",
    ),
    Defect(
        "sent_embeddings_not_discarded",
        "test_contract_streaming.py::test_an_abort_while_the_embeddings_are_on_their_way_leaves_nothing[qwen3_vl]",
        "is held until its lease expires",
        run="streaming",
    ),
    Defect(
        "session_accepted",
        "test_contract_streaming.py::test_a_streaming_input_session_is_refused[qwen3_vl]",
        "DID NOT RAISE",
        run="streaming",
    ),
    Defect(
        "handle_sent_elsewhere",
        "test_contract_streaming.py::test_a_frontend_elsewhere_gets_the_same[qwen3_vl]",
        "a frontend elsewhere got a handle",
        run="streaming",
    ),
    Defect(
        "engines_mixed_up",
        "test_contract_parallel.py::test_every_request_gets_its_own_rows[qwen3_vl-data_parallel_size]",
        "the embeddings are gone",
    ),
    Defect(
        "refusal_removed",
        "test_contract_refusals.py::test_refused_in_one_sentence[qwen3_vl-encoder-decoder-words1]",
        "in 'accepted, ",
    ),
    Defect(
        "rust_frontend_accepted",
        "test_contract_refusals.py::test_refused_in_one_sentence[qwen3_vl-rust frontend-words4]",
        "in 'accepted, ",
    ),
    Defect(
        "engines_not_counted",
        "test_contract_inputs.py::test_a_configuration_made_by_hand_switches_it_on[qwen3_vl]",
        "DID NOT RAISE",
    ),
    Defect(
        "http_opt_in_ignored",
        "test_contract_server.py::test_the_json_is_unchanged_unless_asked[qwen3_vl]",
        "the JSON has mm_embedding although the request did not ask for it",
        run="server, once more",
    ),
    Defect(
        "http_levels_missing",
        "test_contract_server.py::test_levels_come_on_request[qwen3_vl]",
        "no attribute 'mm_embedding_levels'",
        run="server",
    ),
    Defect(
        "http_first_choice_alone",
        "test_contract_server.py::test_every_choice_carries_it[qwen3_vl]",
        "no attribute 'mm_embedding'",
        run="server",
    ),
    Defect(
        "http_null_missing",
        "test_contract_server.py::test_a_chat_without_media_has_null[qwen3_vl]",
        "no attribute 'mm_embedding'",
        run="server",
    ),
    Defect(
        "http_field_missing",
        "test_contract_server.py::test_streaming_carries_it_on_the_last_chunk[qwen3_vl]",
        "no attribute 'mm_embedding'",
        run="server, once more",
    ),
    Defect("off_by_one_rows", "test_reference.py::test_encoder[qwen3_vl-image-and-video]", "shifted by one row"),
    Defect("rows_rounded", "test_reference.py::test_encoder[qwen3_vl-image]", r"relative L2 0\.001\d+ where"),
    Defect(
        "levels_reversed", "test_reference.py::test_encoder[qwen3_vl-image]", "deepstack level 0: .* deepstack level 2"
    ),
    Defect(
        "model_gets_cleared_rows",
        "test_reference.py::test_first_tokens[qwen3_vl-image]",
        "tokens are not Hugging Face's",
    ),
    Defect(
        "batches_rounded",
        "test_properties.py::test_rows_do_not_depend_on_the_batch[qwen3_vl]",
        "in a batch of 2: .* differ",
    ),
    Defect(
        "reference_images_reversed",
        "test_reference.py::test_preprocessing[qwen3_vl-two-images]",
        "cause: order: 14 of 14 rows are not the expected ones: rows 6..13 equal the expected rows 0..7",
        run="reference",
    ),
    Defect(
        "reference_resized",
        "test_reference.py::test_preprocessing[qwen3_vl-image-between-texts]",
        r"cause: processor: image_grid_thw is \[\[1, 6, 8\]\] in vLLM and .* in Hugging Face: another size",
        run="reference",
    ),
    Defect(
        "reference_mean_changed",
        "test_reference.py::test_preprocessing[qwen3_vl-photograph]",
        "cause: processor: pixel_values .* another mean or std",
        run="reference",
    ),
    Defect(
        "reference_grid_transposed",
        "test_reference.py::test_encoder[qwen3_vl-three-sizes]",
        "cause: processor: height and width of the image's grid are exchanged",
        run="reference",
    ),
    Defect(
        "reference_not_normalised",
        "test_reference.py::test_encoder[qwen3_vl-image]",
        "cause: processor: vLLM leaves the image's pixels raw",
        run="reference",
    ),
    Defect(
        "reference_encoder_changed",
        "test_reference.py::test_encoder[qwen3_vl-same-image-twice]",
        "cause: encoder: on the same inputs vLLM's encoder gives other rows",
        run="reference",
    ),
    Defect(
        "reference_audio_truncated",
        "test_reference.py::test_preprocessing[qwen2_audio-audio]",
        "cause: processor: feature_attention_mask marks other places .*: another length",
        run="reference, audio",
    ),
    Defect(
        "golden_value_changed", "test_golden.py::test_golden[qwen3_vl-image]", "does not have the sha256", run="goldens"
    ),
    Defect(
        "golden_rerecorded",
        "test_golden.py::test_golden[qwen3_vl-video]",
        "video: the answer changed, the inputs did not",
        run="goldens",
    ),
    Defect(
        "golden_input_changed",
        "test_golden.py::test_golden[qwen3_vl-two-images]",
        r"two-images: the input changed \(media\)",
        run="goldens",
    ),
)


def tampered_goldens(folder: Path) -> Path:
    """A copy of the goldens with the defects of the run "goldens"."""
    shutil.copytree(ROOT / "golden", folder)
    for defect in DEFECTS:
        if defect.run == "goldens":
            getattr(seeded, defect.name)(folder / "qwen3_vl")
    return folder


def plugin_of_vllm(folder: Path) -> Path:
    """A folder for PYTHONPATH with an installed distribution, whose entry point vLLM's own processes call."""
    metadata = folder / "seeded_defects-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: seeded-defects\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\nseeded = {seeded.__name__}:apply\n")
    return folder


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, TestRecord]]:
    """Runs the suites' tests for the defects of one `run`, once, and gives their records by node id."""
    folder = tmp_path_factory.mktemp("defects")
    goldens, plugin = tampered_goldens(folder / "golden"), plugin_of_vllm(folder / "plugin")
    get = EnginePool.get

    def get_broken(self: EnginePool, spec: EngineSpec) -> Engine:
        if spec.arm is not Arm.ABSENT:
            # In one process where that is possible: it starts faster, and what breaks is the same.
            in_process = spec.in_process or spec.interface is Interface.LLM
            spec = dataclasses.replace(spec, in_process=in_process, setup=f"{seeded.__name__}:apply")
        return get(self, spec)

    @functools.cache
    def run(name: str) -> dict[str, TestRecord]:
        defects = [defect for defect in DEFECTS if defect.run == name]
        results = folder / f"{name}.json"
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.resetwarnings()  # as in a session of the suites, where a library's warning is no error
            if name == "goldens":
                patch.setattr(harness.pytest_plugin, "Goldens", lambda _folder, model: Goldens(goldens, model))
            elif name.startswith("reference"):
                for defect in defects:
                    getattr(seeded, defect.name)(patch)
            else:
                patch.setenv(seeded.VARIABLE, ",".join(defect.name for defect in defects))
                # For `vllm serve`, and for processes that multiprocessing starts: those get this one's path.
                patch.setenv("PYTHONPATH", os.pathsep.join([str(plugin), str(ROOT)]))
                patch.syspath_prepend(plugin)
                patch.setattr(EnginePool, "get", get_broken)
            # A session inside this one: torch and the engine's preloaded modules are imported once for all of them.
            tests = [f"{ROOT}/suites/{defect.caught_by}" for defect in defects]
            options = ["--rootdir", str(ROOT), "--results", str(results), "-p", "no:cacheprovider", "-q"]
            options += ["--basetemp", str(folder / f"{name} files")]
            code = pytest.main([*tests, *options])
        assert code == pytest.ExitCode.TESTS_FAILED
        return {record.nodeid: record for record in Results.read(results).records}

    return run


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_caught(defect: Defect, session: Callable[[str], dict[str, TestRecord]]) -> None:
    record = session(defect.run)[f"suites/{defect.caught_by}"]
    assert record.outcome == "failed", record.message or "the test passed: nobody saw the defect"
    assert re.search(defect.message, record.message), record.message


def test_contributing_lists_them() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.partition("| defect | caught by |\n| --- | --- |\n")[2].partition("\n\n")[0]
    assert table.splitlines() == [defect.row for defect in DEFECTS]
