"""Drawn examples are the same in every run, so that a change alone can make a test fail.

`pytest --hypothesis-profile=explore` draws others each time.
"""

from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("same")
