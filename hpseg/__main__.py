from hpseg.cli.main import main

raise SystemExit(main())
