"""What a teacher's text tells about a run before and beside training: numbers to read, never to train on.

Needs no log-probs, so it works for teachers behind an API. Spends money when the teacher does.
"""
