"""Answer checking. Importing this package is cheap: the graders themselves are imported when first used."""

from xbai.grading.custom import CustomGrader
from xbai.grading.dispatch import GradeRequest, grade
from xbai.grading.pool import GraderPool

__all__ = ["CustomGrader", "GradeRequest", "GraderPool", "grade"]
