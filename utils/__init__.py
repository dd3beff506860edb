"""The ground: parts that know no key, no model and no data set. They import each other and the logger."""
