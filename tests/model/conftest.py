from tests.tiny import checkpoint, folder

__all__ = ["checkpoint", "folder"]
