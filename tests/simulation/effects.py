"""What a schedule can bring about: the simulation proves nothing of what never happens in it."""

from __future__ import annotations

import enum


class Effect(enum.StrEnum):
    SEVERAL_SEQUENCES = "a job of several sequences was answered"
    DOOMED = "a job that can run nowhere ended without a run"
    UNEQUAL_LIMITS = "a job was too large for the worker that got it"
    STOPPED_ENGINE = "an engine that stood still was given up"
    THAWED_ENGINE = "an engine went on after it had stood still"
    LATER_RAN = "a row of a later version was answered"
    LATER_LEFT = "a row of a later version came to a worker of before"
    PASSED_ON = "a message went from the list of all to that of its model"
    GARBAGE = "a message of nobody's was dropped"
    REVOKED_UNREAD = "a message that was revoked before it came was dropped"
    REVOKED_WITHOUT_ROW = "a job was revoked before it had a row"
    TIMED_OUT = "a time limit ended a job"
    TIMED_OUT_BY_ROW = "a time limit that only the row knew of ended a job"
    BESIDE_FLOOD = "a job waited beside the far longer queue of the other model"
    SHARED = "a job ended whose message had others, too"
    TAKEN = "a batch was claimed that nobody had registered"
    TAKEN_AGAIN = "such a claim was repeated, for its fate was unknown"
