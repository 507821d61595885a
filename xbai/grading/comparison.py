"""Comparing answers with each other instead of with the right one."""

from __future__ import annotations

from xbai.grading.dispatch import Grade, GradeRequest, answer_key, grade


def compare(request: GradeRequest) -> Grade | bool:
    """Whether the grader calls two boxed answers equal, whichever of them is taken for the right one.

    The response is one of them; the ground truth the other, or None: then the key of the first is found, and is `key`
    in the extras. May take for ever, as `grade` may.
    """
    if request.ground_truth is None:
        return Grade(1.0, extras={"key": answer_key(request.data_source, request.response)})
    swapped = GradeRequest(request.data_source, request.ground_truth, request.response)
    return bool(grade(request) and grade(swapped))
