"""The tasks, one file each: a module of this package that defines `TASK` is one."""
