"""From a folder of one's own data to a config that inherits from this package's, for ``tools/new_project.py``."""

from ssm_backbones.project.create import NewProject, NewProjectOptions, new_project

__all__ = ['NewProject', 'NewProjectOptions', 'new_project']
