"""Fake job postings (EMSCAD), in either of the two tables that they are given away as: words of the texts, and what else a posting says.

``emscad_v1.csv``, the authors' table, writes flags as ``t`` and ``f``: that is from memory (mem), the file wasn't at hand. Its common copy
``fake_job_postings.csv`` writes 1 and 0.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lit_methods.checks import at_least
from lit_methods.datamodules.base import Ints
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.matrices.base import Floats, MatrixDataModule, Table
from lit_methods.datamodules.reading import once
from lit_methods.datamodules.tables import named_rows, rows_of

FILES = ("fake_job_postings.csv", "emscad_v1.csv")
COLUMNS = (
    "job_id",
    "title",
    "location",
    "department",
    "salary_range",
    "company_profile",
    "description",
    "requirements",
    "benefits",
    "telecommuting",
    "has_company_logo",
    "has_questions",
    "employment_type",
    "required_experience",
    "required_education",
    "industry",
    "function",
    "fraudulent",
)
TEXTS = ("title", "company_profile", "description", "requirements", "benefits")
FLAGS = ("telecommuting", "has_company_logo", "has_questions")
KINDS = ("employment_type", "required_experience", "required_education")
READ = (*TEXTS, *FLAGS, *KINDS, "fraudulent")
HONEST = "team customers engineering design product software support office skills experience growth people"
FRAUD = "earn money home fast wire transfer cash easy daily deposit urgent payments"
BOTH = "work job position company apply email training hours salary candidate"
_CHOICES = {
    "employment_type": ("", "Full-time", "Part-time"),
    "required_experience": ("", "Entry level", "Associate"),
    "required_education": ("", "Bachelor's Degree", "High School or equivalent"),
}
_TRUTH = {"0": 0, "f": 0, "1": 1, "t": 1}
_WAY = f"put {' or '.join(FILES)} there, the table of the Employment Scam Aegean Dataset"


class JobPostingsDataModule(MatrixDataModule):
    """Job postings, some of them frauds: TF-IDF of their words as features, and what else they say as covariates.

    Batch: {"features": (N, P) float64, "label": (N,) int64, "covariates": (N, Q) float64}

    The words are those of title, company profile, description, requirements and benefits; scikit-learn chooses and weighs them on the
    training rows. Covariates are the three flags (remote work, a logo, questions), and a column for each value of the kinds of employment,
    experience and education that a training row has; an empty cell is no value. Label 1 is a fraud. The release has 17,880 postings, 866
    of them frauds.

    Args:
        root: Folder with ``fake_job_postings.csv`` or ``emscad_v1.csv``. None: 120 made-up postings.
        num_words: p, the most frequent words that are kept, English stop words left out; fewer where the texts have fewer.
        test_share: Share of the rows that is held out.
        scale: Features are divided by it.
        steps_per_epoch: Iterations between two validations.
        num_workers: Processes that read data; 0 is fastest.
        seed: Seed of the split.

    Raises:
        ValueError: A number lies outside its range.
        WrongRootError: ``root`` has no such file.
        BrokenRecordError: A row is damaged; the message names it.
    """

    def __init__(
        self,
        root: Path | None = None,
        num_words: int = 2000,
        test_share: float = 0.2,
        scale: float = 1.0,
        steps_per_epoch: int = 25,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(test_share=test_share, scale=scale, steps_per_epoch=steps_per_epoch, num_workers=num_workers, seed=seed)
        at_least(1, num_words=num_words)
        self.save_hyperparameters()
        self.root, self.num_words = data_path(root), num_words

    def check_root(self, stage: str = "fit") -> None:
        """See whether the table is there.

        Raises:
            WrongRootError: It isn't.
        """
        if self.root is not None:
            self._file(self.root)

    @staticmethod
    def _file(root: Path) -> Path:
        found = next((root / name for name in FILES if (root / name).is_file()), None)
        if found is None:
            raise WrongRootError(f"root={str(root)!r} has no {' and no '.join(FILES)}: {_WAY}, or set root=null for made-up postings")
        return found

    def tables(self) -> tuple[Table, Table]:
        """Read, split, weigh the words of the training rows."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        file = Path("made-up postings") if self.root is None else self._file(self.root)
        made = ((number, [row[name] for name in READ]) for number, row in enumerate(made_postings()))
        texts, flags, kinds, label = _parsed(file, made) if self.root is None else read_postings(file)
        train, _ = self.split(len(label))
        vectoriser = TfidfVectorizer(max_features=self.num_words, stop_words="english")
        try:
            vectoriser.fit([texts[row] for row in train])
        except ValueError as problem:
            raise BrokenRecordError(file, "texts", f"no word is left ({problem}): {_WAY}") from problem
        self.feature_names = tuple(vectoriser.get_feature_names_out())
        columns = [_one_hot([row[k] for row in kinds], train) for k in range(len(KINDS))]
        covariates = np.concatenate([flags, *columns], axis=1)
        words = np.asarray(vectoriser.transform(texts).toarray(), np.float64)
        return self.halves(Table(words, label, covariates))


Postings = tuple[list[str], Floats, list[list[str]], Ints]


def read_postings(path: Path) -> Postings:
    """The table of postings.

    Args:
        path: A CSV file whose first line names its columns.

    Returns:
        Texts (n), flags (n, 3) of 0 and 1, kinds (n lists of 3 values, "" where there is none) and labels (n,).

    Raises:
        BrokenRecordError: A column is missing, or a flag or label isn't 0 or 1 (``f`` or ``t``, (mem)); the message names the line.
    """
    header = next((cells for _, cells in rows_of(path, _WAY)), [])
    if "job_id" in header:  # some copies leave it out
        once([cells[0] for _, cells in named_rows(path, ("job_id",), _WAY)], path, "job_id", "posting")
    return _parsed(path, named_rows(path, READ, _WAY))


def _parsed(path: Path, rows: Iterable[tuple[int, list[str]]]) -> Postings:
    texts, flags, kinds, label = [], [], [], []
    for line, cells in rows:
        texts.append(" ".join(cells[: len(TEXTS)]))
        numbers = [*cells[len(TEXTS) : len(TEXTS) + len(FLAGS)], cells[-1]]
        for name, cell in zip((*FLAGS, "fraudulent"), numbers, strict=True):
            if cell not in _TRUTH:
                raise BrokenRecordError(path, f"line {line}", f"{name} is {cell!r}, not 0 or 1 (f or t): repair or leave out the row")
        flags.append([float(_TRUTH[cell]) for cell in numbers[:-1]])
        kinds.append(cells[len(TEXTS) + len(FLAGS) : -1])
        label.append(_TRUTH[numbers[-1]])
    if len(set(label)) != 2:
        raise BrokenRecordError(path, "fraudulent", f"{len(label)} rows with labels {sorted(set(label))}, both 0 and 1 are needed: {_WAY}")
    return texts, np.array(flags), kinds, np.array(label, np.int64)


def made_postings(rows: int = 120, seed: int = 0) -> list[dict[str, str]]:
    """Made-up postings, every fourth of them a fraud: frauds use other words, and have a logo less often.

    Args:
        rows: Postings.
        seed: Of the words.

    Returns:
        Column -> cell of each posting.
    """
    rng, found = np.random.default_rng(seed), []
    for number in range(rows):
        fraud = int(number % 4 == 0)
        words = (FRAUD if fraud else HONEST).split() + BOTH.split()
        row = dict.fromkeys(COLUMNS, "") | {name: " ".join(rng.choice(words, 12)) for name in TEXTS}
        flags = {"telecommuting": rng.random() < 0.1, "has_company_logo": rng.random() < (0.3 if fraud else 0.8)}
        flags |= {"has_questions": rng.random() < 0.5, "fraudulent": bool(fraud)}
        row |= {name: str(int(flag)) for name, flag in flags.items()}
        row |= {name: str(rng.choice(choices)) for name, choices in _CHOICES.items()}
        found.append(row | {"job_id": str(number + 1), "location": "US, NY, New York"})
    return found


def _one_hot(values: Sequence[str], train: Ints) -> Floats:
    """(n, k) of 0 and 1: a column for each value but "" of the training rows, in alphabetical order."""
    known = sorted({values[row] for row in train} - {""})
    return np.array([[float(value == one) for one in known] for value in values]).reshape(len(values), len(known))


__all__ = ["COLUMNS", "FILES", "JobPostingsDataModule", "made_postings", "read_postings"]
