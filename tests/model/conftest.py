from tests.tiny import checkpoint

__all__ = ["checkpoint"]
