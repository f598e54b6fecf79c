//! The format from outside: what is written, what is read back, and that no damage goes unseen.

#[cfg(test)]
mod container;
#[cfg(test)]
mod documents;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod keys;
#[cfg(test)]
mod names;
#[cfg(test)]
mod norm;
#[cfg(test)]
mod samples;
