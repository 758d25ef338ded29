//! A whole store, for the domain that serves it.
