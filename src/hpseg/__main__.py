from hpseg.cli import main

raise SystemExit(main())
