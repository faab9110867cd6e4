"""The four choices and the algebras; knows no paper."""
