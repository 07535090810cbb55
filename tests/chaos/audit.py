"""Witnesses inside the database: triggers that note every move of a job and every change that must not happen.

They only write; what they found is read by `tests.chaos.invariants`.
"""

from sqlalchemy import Connection, text

from farm.states import TRANSITIONS

_TABLES = """
CREATE TABLE chaos_wrongs (at timestamptz DEFAULT clock_timestamp(), invariant text NOT NULL, what text NOT NULL);
CREATE TABLE chaos_moves (at timestamptz DEFAULT clock_timestamp(), job_id uuid, old text, new text, attempt int);
"""

_ON_JOBS = """
CREATE FUNCTION chaos_on_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.state = 'succeeded' THEN
        INSERT INTO chaos_wrongs (invariant, what)
        VALUES ('I3', format('job %s had succeeded and was changed', OLD.id));
    END IF;
    IF OLD.state <> NEW.state THEN
        INSERT INTO chaos_moves (job_id, old, new, attempt) VALUES (NEW.id, OLD.state, NEW.state, NEW.attempt);
        IF NOT (OLD.state || ' ' || NEW.state = ANY(ARRAY[{allowed}])) THEN
            INSERT INTO chaos_wrongs (invariant, what)
            VALUES ('I3', format('job %s went from %s to %s', OLD.id, OLD.state, NEW.state));
        END IF;
    END IF;
    IF NEW.attempt <> OLD.attempt
       AND NOT (OLD.state = 'queued' AND NEW.state = 'running' AND NEW.attempt = OLD.attempt + 1) THEN
        INSERT INTO chaos_wrongs (invariant, what)
        VALUES ('I3', format('attempt of job %s went from %s to %s', OLD.id, OLD.attempt, NEW.attempt));
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_on_jobs AFTER UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION chaos_on_jobs();
"""

_ON_ATTEMPTS = """
CREATE FUNCTION chaos_on_attempts() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE until timestamptz;
BEGIN
    IF OLD.outcome IS NOT NULL THEN
        INSERT INTO chaos_wrongs (invariant, what)
        VALUES ('I3', format('attempt %s of job %s had ended and was changed', OLD.number, OLD.job_id));
    END IF;
    IF NEW.outcome = 'crashed' THEN
        SELECT lease_until INTO until FROM claims WHERE id = NEW.claim_id;
        IF until > clock_timestamp() THEN
            INSERT INTO chaos_wrongs (invariant, what) VALUES
            ('I3', format('attempt %s of job %s was taken back within its lease', OLD.number, OLD.job_id));
        END IF;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_on_attempts AFTER UPDATE ON attempts FOR EACH ROW EXECUTE FUNCTION chaos_on_attempts();
"""

_ON_IMAGES = """
CREATE FUNCTION chaos_on_images() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE present int;
BEGIN
    IF TG_OP = 'UPDATE' THEN
        INSERT INTO chaos_wrongs (invariant, what) VALUES ('I2', format('image of job %s was replaced', OLD.job_id));
    END IF;
    SELECT attempt INTO present FROM jobs WHERE id = NEW.job_id;
    IF NEW.key NOT LIKE format('%%/%s/%s-%s.png', NEW.job_id, present, NEW.sha256) THEN
        INSERT INTO chaos_wrongs (invariant, what)
        VALUES ('I3', format('job %s is in attempt %s and got the image %s', NEW.job_id, present, NEW.key));
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_on_images AFTER INSERT OR UPDATE ON images FOR EACH ROW EXECUTE FUNCTION chaos_on_images();
"""


def install(conn: Connection) -> None:
    """Put the witnesses in place."""
    moves = [f"'{old} {new}'" for old, allowed in TRANSITIONS.items() for new in allowed]
    driver = conn.connection.driver_connection
    assert driver is not None
    for statements in (_TABLES, _ON_JOBS.replace("{allowed}", ", ".join(sorted(moves))), _ON_ATTEMPTS, _ON_IMAGES):
        driver.execute(statements)


def wrongs(conn: Connection) -> list[tuple[str, str]]:
    """What the witnesses saw that must not happen: (invariant, what)."""
    found = conn.execute(text("SELECT invariant, what FROM chaos_wrongs ORDER BY at LIMIT 100"))
    return [(row.invariant, row.what) for row in found]
