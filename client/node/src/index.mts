/** The same package for ESM: one copy of it in a process, whoever imports it how. */
export { attach, Keyring, LOOKUP_BUCKETS, metrics, ResumedError } from "./index.js";
export type { Installation, Logger, Options, Reload, Stats, TicketSecretState, Tls } from "./index.js";
