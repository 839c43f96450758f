"""The built-in suite: five skills, made on the spot from content that libraries bundle.

Nothing is downloaded. Content is held out, not only samples: other words, tables, numbers and
handwriting in the test split than in the training split (shapes have no content to hold out).
"""

from eval.skills.scene import Question, Scene
from eval.skills.suite import SKILLS, make_scene, write_suite

__all__ = ["SKILLS", "Question", "Scene", "make_scene", "write_suite"]
