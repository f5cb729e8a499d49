/**
 * TLS sessions of Node's servers in a central store, so that any frontend of a fleet resumes the sessions of every other,
 * Node's or another with OpenSSL's sessions.
 *
 * A handshake never waits for the server beyond a deadline, and not at all while the circuit breaker is open. Any failure costs a
 * full handshake and a count in {@link Stats}, nothing else.
 */
export { attach, type Installation, type Options, type TicketSecretState } from "./attach.js";
export { ResumedError } from "./errors.js";
export type { Logger, Reload } from "./files.js";
export { Keyring } from "./keyring.js";
export { metrics } from "./metrics.js";
export { LOOKUP_BUCKETS, type Stats } from "./stats.js";
export type { Tls } from "./store.js";
