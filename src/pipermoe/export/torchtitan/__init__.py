"""torchtitan: plans as Python modules that return its Trainer.Config, and such modules as plans.

torchtitan reads no files; its configuration is code. What is written here is a call of the registered model's function
and assignments of literals, and only such a module is read back: it is parsed, never executed.
"""
