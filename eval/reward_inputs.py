"""What the evaluation of a reward model starts from: the settings of its training, its tokenizer,
and rows of answers to choose from, pairs or more, with the column that they are told apart by.
"""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from eval import benchmarks, held_out
from eval.inputs import first_rows, read_pairs, recipe_of, training_record
from train.data import shapes, tokens
from train.data.dataset import Tokenised
from train.data.errors import DataError, listed
from train.data.rows import PAIR_COLUMNS, Candidates, check_candidates
from train.data.sources import read_rows
from train.engine import dist
from train.models import pretrained
from train.run import folder
from train.settings import Reward, inherited_defaults

# A model that training here did not make is computed by its own class: see eval/judges.py.
INHERITED = inherited_defaults(Reward) | {"layout": "padded"}
MOST_VALUES = 200  # of the column that rows are told apart by
NO_VALUE = "(none)"


class RewardInputs(NamedTuple):
    """What is scored, and how."""

    path: str  # the reward model's directory or hub name
    record: dict  # its run.json, {} where there is none
    recipe: dict  # see eval.inputs.recipe_of
    tokenizer: PreTrainedTokenizerBase
    data: Tokenised  # groups of a prompt with two or more answers, the chosen ones first
    rows: list[Candidates]  # of `data`, in its order
    by: list[str] | None  # of `data`, the values of the column --by
    benchmark: str | None  # whose rows these are: benchmarks.name_of
    ids: list[str] | None  # of `data`, the values of the column id; where `benchmark` needs them
    described: dict  # the data set, for the report


def open_inputs(settings, run) -> RewardInputs:
    """Read everything but the reward model's weights. Every rank calls this.

    run: the evaluation's train.run.folder.RunFolder. DataError, or ValueError for what flags name.
    """
    path = settings.reward_model
    record, where = training_record(path, task="reward")
    recipe = recipe_of(settings, record, where, INHERITED)
    tokenizer = pretrained.load_tokenizer(path, settings.trust_remote_code)
    chosen_rows = held_out.choose(settings, record, check_candidates)
    sources, columns = chosen_rows.sources, chosen_rows.columns
    with dist.main_process_first():  # rank 0 tokenises, the others find it in the cache
        all_rows = read_pairs(
            chosen_rows,
            tokenizer,
            recipe,
            kind="candidates",
            keep_tail=True,  # scores are read at the end of what the template renders
        )
        data = first_rows(all_rows, settings.max_rows)
    run.note_dropped({"reward_data": data.dropped})
    which = chosen_rows.said(all_rows)
    run.say(
        f"data of the reward model: {which}: {', '.join(map(str, sources))}, {len(data):,} rows"
    )
    for note in data.notes():
        run.say(f"data of the reward model: {note}")
    checked, _ = tokens.check_rows(sources, check_candidates, PAIR_COLUMNS, columns=columns)
    by_number = {row.number: row.item for row in checked}
    rows = [by_number[number] for number in data.rows.tolist()]
    by = benchmark = ids = None
    if settings.by:
        by = column_of(sources, settings.by, data, columns)
        _refuse_many(settings.by, by)
        benchmark = benchmarks.name_of(by, any(len(row.answers) > 2 for row in rows))
        if benchmark == "RewardBench 2":
            ids = column_of(sources, "id", data, columns)
    described = folder.describe(data, sources) | {"which": which}
    run.note(reward_model={"path": path, "recipe": recipe, "data": described})
    return RewardInputs(
        path=path,
        record=record,
        recipe=recipe,
        tokenizer=tokenizer,
        data=data,
        rows=rows,
        by=by,
        benchmark=benchmark,
        ids=ids,
        described=described,
    )


def column_of(
    sources: list[str], name: str, data: Tokenised, columns: list[str] | None
) -> list[str]:
    """The column `name` of the rows of `data`; NO_VALUE where it is null or empty.

    DataError where no row has it, or where it holds something other than strings.
    """
    renamed = shapes.parse_columns(columns)
    wanted = set(data.rows.tolist())
    values, found = {}, {}
    for number, (source, index, row) in enumerate(read_rows(sources)):
        if number not in wanted:
            continue
        row = shapes.rename(row, renamed)
        found.update(dict.fromkeys(row))
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{source} row {index}: the column {name!r} holds {value!r:.40}, not a string"
            )
        values[number] = value or NO_VALUE
    if name not in found:
        raise DataError(f"{', '.join(sources)}: no column {name!r}; found {listed(list(found))}")
    return [values[number] for number in data.rows.tolist()]


def _refuse_many(name: str, values: list[str]):
    """DataError where a column has about as many values as rows."""
    if (count := len(set(values))) > MOST_VALUES:
        raise DataError(
            f"--by {name}: {count} different values in {len(values)} rows; it takes a column that "
            f"groups rows, of at most {MOST_VALUES} values"
        )
