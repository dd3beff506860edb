"""Operations with a readable reference and faster implementations of the same function."""
