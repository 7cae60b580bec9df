"""Writing selections in the forms that other training stacks read. A pool itself is never changed."""
