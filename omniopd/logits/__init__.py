"""The mathematics of open-weight teachers: estimators, divergences across vocabularies, alignment and diagnostics.

Nothing here knows a model, a server or the loop: numbers in, numbers out.
"""
