"""x / sqrt(sum x^2 + eps), one kernel forward and one backward: what keys and queries are brought to on their way in."""
