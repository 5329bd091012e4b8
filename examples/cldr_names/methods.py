"""The two teachers and six students that the demo compares."""

from __future__ import annotations

from ..common.methods import CE_STUDENT, CE_TEACHER, CUD, DUS_TEACHER, EXACT, KD, KD_CLIP, KD_DUS

TEACHERS = (CE_TEACHER, DUS_TEACHER)
STUDENTS = (CE_STUDENT, KD, KD_DUS, KD_CLIP, CUD, EXACT)
METHODS = TEACHERS + STUDENTS
