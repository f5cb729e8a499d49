/** The circuit breaker, and the pause after a refusal because of a limit. protos/vectors/policy.json has the policy of all clients. */

/** Failures in a row that open a breaker. */
export const FAILURES = 3;
/** Milliseconds before each probe while a breaker is open; doubles each time. */
export const PROBE_PAUSE_MS = { first: 50, max: 500 };
/** Milliseconds without an opening after which the probes begin with the first pause again. */
export const PROBE_RESET_MS = 10_000;
/** Milliseconds without calls after the server refused one because of a limit; doubles with each refusal in a row. */
export const LIMIT_PAUSE_MS = { first: 50, max: 800 };
/** Milliseconds after such a refusal in which a timeout is a refusal that the server delays. */
export const SCARCITY_MS = 5000;
/** Factor by which such a refusal lowers the share of sessions that are served. */
export const SHARE_PER_REFUSAL = 0.9;
/** By how much that share rises in a second. */
export const SHARE_PER_SECOND = 0.005;

/**
 * Failures in a row open it, so that an outage costs handshakes nothing; the first success of a probe closes it. Once closed by a
 * probe, a single failure opens it again. Calls that were under way together count once: if the process or the network stalls for a
 * moment, all of them time out. All times are milliseconds of performance.now().
 */
export class Breaker {
  #failures = 0;
  #failedAt = -Infinity;
  #openedAt = -Infinity;
  #probePause = 0;
  #limitPause = 0;
  #pausedAt = -Infinity;
  #limitedAt = -Infinity;
  #share = 1;
  #shareAt = 0;
  #open = false;
  #answered = true;

  /** Whether handshakes make no look-ups. */
  get open(): boolean {
    return this.#open;
  }

  /** Whether the server carried out the last call, if there was any. */
  get answered(): boolean {
    return this.#answered;
  }

  /** Whether calls pause because the server has just refused one for a limit. */
  get limited(): boolean {
    return performance.now() < this.#pausedAt + this.#limitPause;
  }

  /**
   * Whether a session is stored and looked up while operations are scarce. Its store key decides, so that all frontends choose the
   * same sessions: calls for some of them that succeed gain more than calls for all of them of which the server refuses a part. Other
   * clients issue ids that no frontend looks up; Node cannot choose ids.
   */
  serves(storeKey: Buffer): boolean {
    return storeKey.readUInt32BE() < this.#servedShare() * 2 ** 32;
  }

  /** Records a call that failed, and returns whether it opened the breaker. */
  fail(began: number, timeout: boolean): boolean {
    this.#answered = false;
    const now = performance.now();
    if (timeout && now - this.#limitedAt < SCARCITY_MS) {
      this.#lengthenLimitPause(began); // a server that refuses much delays its refusals
      return false;
    }
    if (began < this.#failedAt) return false;
    this.#failures++;
    this.#failedAt = now;
    if (this.#open || this.#failures < FAILURES) return false;
    if (now - this.#openedAt > PROBE_RESET_MS) this.#probePause = 0;
    this.#openedAt = now;
    this.#open = true;
    return true;
  }

  /** Returns the milliseconds before the next probe. */
  nextProbePause(): number {
    this.#probePause = Math.min(Math.max(2 * this.#probePause, PROBE_PAUSE_MS.first), PROBE_PAUSE_MS.max);
    return this.#probePause;
  }

  /** Records a call that the server refused because of a limit, and returns whether it closed the breaker. */
  limit(began: number): boolean {
    this.#answered = false;
    this.#limitedAt = performance.now();
    this.#lengthenLimitPause(began);
    return this.#close();
  }

  /** Records a call that the server carried out in time, and returns whether it closed the breaker. */
  succeed(): boolean {
    this.#answered = true;
    this.#limitPause = 0;
    this.#pausedAt = -Infinity;
    return this.#close();
  }

  #lengthenLimitPause(began: number): void {
    if (began < this.#pausedAt) return;
    this.#limitPause = Math.min(Math.max(2 * this.#limitPause, LIMIT_PAUSE_MS.first), LIMIT_PAUSE_MS.max);
    this.#share = SHARE_PER_REFUSAL * this.#servedShare();
    this.#pausedAt = this.#shareAt = performance.now();
  }

  #servedShare(): number {
    return Math.min(1, this.#share + (SHARE_PER_SECOND * (performance.now() - this.#shareAt)) / 1000);
  }

  #close(): boolean {
    const closes = this.#open;
    this.#failures = closes ? FAILURES - 1 : 0;
    this.#open = false;
    return closes;
  }
}
