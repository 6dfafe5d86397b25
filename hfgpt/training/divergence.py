"""Rollbacks of a run that diverged: the log is their only record."""

# Entry of the log at a step where a run diverged: the step whose weights and optimizer state it went back to.
ROLLBACK = "rollback_to_step"


def find_rollbacks(log_history: list[dict[str, float]]) -> list[dict[str, int]]:
    """The rollbacks of a run: the step at which it diverged, and the step whose state it went back to."""
    return [{"from_step": row["step"], "to_step": row[ROLLBACK]} for row in log_history if ROLLBACK in row]
