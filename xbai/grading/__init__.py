"""Answer checking. Importing this package is cheap: the graders themselves are imported when first used."""

from xbai.grading.answer_groups import AnswerGroups
from xbai.grading.custom import CustomBatchGrader, CustomGrader
from xbai.grading.dispatch import FAILURES, Grade, GradeRequest, answer_key, grade
from xbai.grading.pool import GraderPool

__all__ = [
    "FAILURES",
    "AnswerGroups",
    "CustomBatchGrader",
    "CustomGrader",
    "Grade",
    "GradeRequest",
    "GraderPool",
    "answer_key",
    "grade",
]
